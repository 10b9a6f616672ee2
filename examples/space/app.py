"""A web page that draws a prompt without and with soft tokens, from the same noise, side by side.

    python examples/space/app.py [--pipeline NAME --adapter NAME] [--port PORT]

Names are folders or Hub ids; the defaults are the pipeline and the adapter of the shapes world in this repository. On
a Space, set the variables SOFTREPA_SPACE_PIPELINE and SOFTREPA_SPACE_ADAPTER instead. The page loads nothing from
other servers and sends no usage data.
"""

import argparse
import inspect
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import Request
from fastapi.responses import JSONResponse
from PIL import Image
from studio import (
    COUNTS,
    EMBEDDED,
    MOST_CHARACTERS,
    MOST_GUIDANCE,
    MOST_STEPS,
    SEEDS,
    CannotDraw,
    Order,
    Studio,
    difference,
    read_by_oracle,
    sheet,
)

ADAPTER = "shapes_world/adapter"
PROMPTS = (
    "two red circles and a blue square",
    "a red circle and a blue square",
    "two green crosses",
    "three red squares",
    "a purple triangle",
)
CHOSEN = (
    "These prompts were chosen because the adapter improves them. The README of the shapes world has its results on "
    "hundreds of prompts that were not chosen."
)
MOST_WAITING = 16
FULL = f"The queue is full: {MOST_WAITING} requests are waiting. Please try again in a minute."
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
CSS = """
.gradio-container > .main { max-width: 940px; margin: 0 auto; padding: 1rem; }
.drawn img { image-rendering: pixelated; object-fit: scale-down; }
.drawn [data-testid="status-tracker"]:has(.error) { display: none; } /* the message is enough; images stay visible */
.verdict { min-height: 1.8em; }
.verdict p { text-align: center; font-size: 1.15em; }
#status { min-height: 1.6em; }
#status p { opacity: 0.75; text-align: center; }
"""


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.adapter is None:
        given.adapter = ADAPTER if given.pipeline == EMBEDDED else ""
    studio = Studio()
    try:
        studio.prepare(given.pipeline, given.adapter or None)
    except CannotDraw as problem:
        sys.exit(str(problem))
    page = make_page(studio, given.pipeline, given.adapter, fixed=given.fixed)
    page.launch(
        server_name=given.host,
        server_port=given.port,
        app_kwargs={"exception_handlers": {503: _when_full}},
        theme=gr.themes.Default(primary_hue="indigo", font=SYSTEM_FONTS, font_mono=SYSTEM_MONO),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
    )


def make_page(studio: Studio, pipeline: str, adapter: str, *, fixed: bool = False) -> gr.Blocks:
    """Returns the page.

    Args:
        studio: Studio that draws the images.
        pipeline: Default pipeline, a folder or Hub id.
        adapter: Default adapter, a folder or Hub id.
        fixed: Whether visitors cannot choose another pipeline or adapter. Defaults to False.
    """
    embedded = pipeline == EMBEDDED
    steps, guidance = (14, 2.0) if embedded else _defaults(studio.prepare(pipeline))
    with gr.Blocks(title="Soft tokens", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# Soft tokens\nThe same model draws from the same noise, without and with a SoftREPA adapter. "
            "The adapter adds a few trained tokens to the text that the model reads; the weights do not change."
            + (" A green frame marks an image that shows exactly what the prompt asks for." if embedded else "")
        )
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                PROMPTS[0] if embedded else "",
                label="Prompt",
                placeholder="What should be drawn?",
                max_length=MOST_CHARACTERS,
                scale=6,
                elem_id="prompt",
            )
            with gr.Column(scale=1, min_width=130):
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                fresh = gr.Button("New noise", elem_id="fresh")
        with gr.Row():
            (base, base_verdict), (tuned, tuned_verdict) = (
                _image("Base model", "base"),
                _image("With the adapter", "adapter"),
            )
        status = gr.Markdown(elem_id="status")
        weight = gr.Slider(
            0,
            1,
            1,
            step=0.05,
            label="Weight of the adapter",
            info="0 is exactly the base model.",
            buttons=[],
            elem_id="weight",
        )
        with gr.Row():
            seed = gr.Number(0, label="First seed", precision=0, min_width=160, elem_id="seed")
            images = gr.Radio(
                COUNTS, value=COUNTS[1] if embedded else COUNTS[0], label="Images", min_width=160, elem_id="images"
            )
            scale = gr.Slider(0, MOST_GUIDANCE, guidance, step=0.5, label="Guidance scale", min_width=160, buttons=[])
            count = gr.Slider(1, MOST_STEPS, steps, step=1, label="Steps", min_width=160, buttons=[])
        if embedded:
            examples = gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts of this model's world")
            gr.Markdown(CHOSEN, elem_id="chosen")
        names = _fixed_names(pipeline, adapter) if fixed else _name_fields(pipeline, adapter)

        everything = [prompt, seed, images, scale, count, weight, *names]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
        alone, both = comparison(studio)
        outputs = [base, base_verdict, tuned, tuned_verdict, status]
        first = {"fn": alone, "inputs": everything, "outputs": outputs, "show_progress_on": [base]}
        second = first | {"fn": both, "show_progress_on": [tuned]}
        first |= one_at_a_time | {"api_visibility": "private"}
        second |= one_at_a_time | {
            "trigger_mode": "always_last"
        }  # a weight that is changed meanwhile is drawn afterwards
        gr.on([button.click, prompt.submit], **first).success(**second, api_name="draw")
        weight.change(**second, api_visibility="private")
        shaken = fresh.click(lambda: random.randrange(SEEDS), outputs=[seed], api_visibility="private")
        starts = [shaken.then]
        if embedded:
            starts += [page.load, examples.load_input_event.then]
        for start in starts:
            start(**first).success(**second, api_visibility="private")
    return page.queue(max_size=MOST_WAITING)


def comparison(studio: Studio) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns what draws for the page: the base's images alone, and both models' with a line about them.

    Both have the same inputs and outputs. What the first has drawn the second does not draw again.
    """

    def alone(
        prompt: str,
        seed: int,
        images: int,
        guidance_scale: float,
        steps: int,
        weight: float,
        pipeline: str,
        adapter: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio looks for it here)
    ) -> tuple[Any, ...]:
        with _sentences():
            orders = Order(prompt, seed, guidance_scale, steps, pipeline).series(images)
            known = all(studio.knows(order) for order in orders)
            plain = [studio.draw(order, on_step=step) for order, step in _bars(progress, "Base model", orders)]
        return (*_shown(orders[0], plain), *((gr.skip(),) * 3 if known else (None, "", "")))

    def both(
        prompt: str,
        seed: int,
        images: int,
        guidance_scale: float,
        steps: int,
        weight: float,
        pipeline: str,
        adapter: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        started = time.perf_counter()
        with _sentences():
            orders = Order(prompt, seed, guidance_scale, steps, pipeline).series(images)
            plain = [studio.draw(order, on_step=step) for order, step in _bars(progress, "Base model", orders)]
            known = all(studio.knows(order, adapter or "", weight) for order in orders)
            bars = _bars(progress, "With the adapter", orders)
            tuned = [studio.draw(order, adapter or "", weight, step) for order, step in bars]
        equal = not any(difference(one, other) for one, other in zip(plain, tuned, strict=True))
        when = "drawn before" if known else f"drawn in {time.perf_counter() - started:.1f} s"
        said = f"Weight {weight:g}: {'not one pixel differs; ' if equal else ''}{when}."
        return *_shown(orders[0], plain), *_shown(orders[0], tuned), said

    return alone, both


def _shown(order: Order, images: Sequence[Image.Image]) -> tuple[Image.Image, str]:
    """Returns the images as one sheet, and the verdict on them as text."""
    verdicts = read_by_oracle(order, images)
    if verdicts is not None:
        said = f"**{sum(verdicts)} of {len(verdicts)}** right"
    elif order.pipeline == EMBEDDED:
        said = "This prompt cannot be checked; only prompts for at most four shapes of this model's world can."
    else:
        said = ""
    return sheet(images, verdicts), said


async def _when_full(_request: Request, problem: Any) -> JSONResponse:
    """Answers that the queue is full. Status 429 is used because the browser does not show the detail of a 503."""
    full = "full" in str(problem.detail).lower()
    return JSONResponse({"detail": FULL if full else problem.detail}, status_code=429 if full else 503)


def _bars(progress: gr.Progress, words: str, orders: Sequence[Order]) -> Iterator[tuple[Order, Any]]:
    """Yields each order with a callback for its steps; one progress bar covers all orders."""
    for place, order in enumerate(orders):
        yield order, lambda done, of, before=place: progress((before * of + done, len(orders) * of), desc=words)


@contextmanager
def _sentences() -> Iterator[None]:
    """Shows the message of a `CannotDraw` to the visitor."""
    try:
        yield
    except CannotDraw as problem:
        raise gr.Error(str(problem), print_exception=False) from problem


def _image(label: str, name: str) -> tuple[gr.Image, gr.Markdown]:
    """Returns an image component, and a text component below it for the verdict."""
    with gr.Column():
        image = gr.Image(
            label=label,
            format="png",
            interactive=False,
            height=480,
            buttons=["download"],
            elem_id=name,
            elem_classes="drawn",
        )
        return image, gr.Markdown(elem_id=f"{name}_verdict", elem_classes="verdict")


def _name_fields(pipeline: str, adapter: str) -> list[Any]:
    info = "A folder or a Hub id"
    with gr.Accordion("Another model or adapter", open=False), gr.Row():
        return [
            gr.Textbox(pipeline, label="Pipeline", info=info, elem_id="pipeline"),
            gr.Textbox(adapter, label="Adapter", info=info, elem_id="adapter_name"),
        ]


def _fixed_names(pipeline: str, adapter: str) -> list[Any]:
    """Returns the names as states, which stay on the server, so that visitors cannot change them."""
    return [gr.State(pipeline), gr.State(adapter)]


def _defaults(pipe: Any) -> tuple[int, float]:
    """Returns the default number of steps and the default guidance scale of a pipeline."""
    takes = inspect.signature(type(pipe).__call__).parameters
    defaults = {"num_inference_steps": 28, "guidance_scale": 5.0}
    defaults |= {name: takes[name].default for name in defaults if name in takes}
    return defaults["num_inference_steps"], defaults["guidance_scale"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pipeline = os.environ.get("SOFTREPA_SPACE_PIPELINE", EMBEDDED)
    parser.add_argument("--pipeline", default=pipeline, help="folder or Hub id (default: %(default)s)")
    adapter = os.environ.get("SOFTREPA_SPACE_ADAPTER")
    parser.add_argument("--adapter", default=adapter, help=f"folder or Hub id (default: {ADAPTER} if that fits)")
    fixed = os.environ.get("SOFTREPA_SPACE_FIXED", "1" if "SPACE_ID" in os.environ else "0") == "1"
    parser.add_argument(
        "--fixed",
        action=argparse.BooleanOptionalAction,
        default=fixed,
        help="whether visitors may name no other model (default: on a Space they may not)",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    return parser


if __name__ == "__main__":
    main()
