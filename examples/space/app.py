"""A page that draws a prompt without and with soft tokens, from the same noise, side by side.

    python examples/space/app.py [--pipeline NAME --adapter NAME] [--port PORT]

Names are folders or Hub ids; without any, the pipeline and the adapter of the shapes world in this repository. On a
Space the same is said by the variables SOFTREPA_SPACE_PIPELINE and SOFTREPA_SPACE_ADAPTER. The page fetches nothing
from elsewhere and reports to nobody.
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
from studio import MOST_GUIDANCE, MOST_STEPS, PLACES, CannotDraw, Order, Studio, difference, enlarged

PIPELINE = "shapes_world/sd3"
ADAPTER = "shapes_world/adapters/softrepa-hard"
PROMPTS = (
    "a red circle and a blue square",
    "three green triangles",
    "a cross left of a yellow circle",
    "two black squares and a red triangle",
)
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
CSS = """
.gradio-container > .main { max-width: 940px; margin: 0 auto; padding: 1rem; }
.picture img { image-rendering: pixelated; object-fit: scale-down; }
.picture [data-testid="status-tracker"]:has(.error) { display: none; } /* the sentence is enough; pictures stay */
#status { min-height: 1.6em; }
#status p { opacity: 0.75; text-align: center; }
"""


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    if given.adapter is None:
        given.adapter = ADAPTER if given.pipeline == PIPELINE else ""
    studio = Studio()
    try:
        studio.prepare(given.pipeline, given.adapter or None)
    except CannotDraw as problem:
        sys.exit(str(problem))
    page = make_page(studio, given.pipeline, given.adapter, fixed=given.fixed)
    page.launch(
        server_name=given.host,
        server_port=given.port,
        theme=gr.themes.Default(primary_hue="indigo", font=SYSTEM_FONTS, font_mono=SYSTEM_MONO),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
    )


def make_page(studio: Studio, pipeline: str, adapter: str, *, fixed: bool = False) -> gr.Blocks:
    """Returns the page.

    Args:
        studio: What draws.
        pipeline: Drawn with unless the visitor names another.
        adapter: Likewise.
        fixed: Whether the visitor may not.
    """
    embedded = pipeline == PIPELINE
    steps, guidance = (14, 3.0) if embedded else _defaults(studio.prepare(pipeline))
    with gr.Blocks(title="Soft tokens", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# Soft tokens\nThe same model draws the same noise twice: as it is, and with a SoftREPA adapter, which "
            "adds a few learned tokens to the text that it reads. Not one of its weights changes."
        )
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                PROMPTS[0] if embedded else "",
                label="Prompt",
                placeholder="What should be drawn?",
                scale=6,
                elem_id="prompt",
            )
            with gr.Column(scale=1, min_width=130):
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                fresh = gr.Button("New noise", elem_id="fresh")
        with gr.Row():
            base, tuned = _picture("Base model", "base"), _picture("With the adapter", "adapter")
        status = gr.Markdown(elem_id="status")
        weight = gr.Slider(
            0,
            1,
            1,
            step=0.05,
            label="Weight of the adapter",
            info="At 0 it is the base model, bit for bit.",
            buttons=[],
            elem_id="weight",
        )
        with gr.Row():
            seed = gr.Number(0, label="Seed of the noise", precision=0, min_width=160, elem_id="seed")
            scale = gr.Slider(0, MOST_GUIDANCE, guidance, step=0.5, label="Guidance scale", min_width=160, buttons=[])
            count = gr.Slider(1, MOST_STEPS, steps, step=1, label="Steps", min_width=160, buttons=[])
        if embedded:
            examples = gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts of this model's world")
        names = _fixed_names(pipeline, adapter) if fixed else _name_fields(pipeline, adapter)

        everything = [prompt, seed, scale, count, weight, *names]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
        alone, both = comparison(studio)
        first = {"fn": alone, "inputs": everything, "outputs": [base, tuned, status], "show_progress_on": [base]}
        second = first | {"fn": both, "show_progress_on": [tuned]}
        first |= one_at_a_time | {"api_visibility": "private"}
        second |= one_at_a_time | {"trigger_mode": "always_last"}  # what moves meanwhile is drawn afterwards
        gr.on([button.click, prompt.submit], **first).success(**second, api_name="draw")
        weight.change(**second, api_visibility="private")
        shaken = fresh.click(lambda: random.randrange(2**31), outputs=[seed], api_visibility="private")
        starts = [shaken.then]
        if embedded:
            starts += [page.load, examples.load_input_event.then]
        for start in starts:
            start(**first).success(**second, api_visibility="private")
    return page


def comparison(studio: Studio) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns what draws for the page: the base's picture alone, and both with a line about them.

    Both have the same inputs and outputs. What the first has drawn the second does not draw again.
    """

    def alone(
        prompt: str,
        seed: int,
        guidance_scale: float,
        steps: int,
        weight: float,
        pipeline: str,
        adapter: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio looks for it here)
    ) -> tuple[Any, Any, Any]:
        with _sentences():
            order = Order(prompt, seed, guidance_scale, steps, pipeline)
            if studio.knows(order):
                return enlarged(studio.draw(order)), gr.skip(), gr.skip()
            return enlarged(studio.draw(order, on_step=_bar(progress, "Base model"))), None, ""

    def both(
        prompt: str,
        seed: int,
        guidance_scale: float,
        steps: int,
        weight: float,
        pipeline: str,
        adapter: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, Any, str]:
        started = time.perf_counter()
        with _sentences():
            order = Order(prompt, seed, guidance_scale, steps, pipeline)
            plain = studio.draw(order, on_step=_bar(progress, "Base model"))
            known = studio.knows(order, adapter or "", weight)
            tuned = studio.draw(order, adapter or "", weight, _bar(progress, "With the adapter"))
        share = difference(plain, tuned)
        differ = f"{share:.0%} of the pixels differ" if share else "not one pixel differs"
        when = "drawn before" if known else f"drawn in {time.perf_counter() - started:.1f} s"
        return enlarged(plain), enlarged(tuned), f"Weight {weight:g}: {differ}; {when}."

    return alone, both


def _bar(progress: gr.Progress, words: str) -> Callable[[int, int], None]:
    return lambda done, of: progress((done, of), desc=words)


@contextmanager
def _sentences() -> Iterator[None]:
    """Shows the visitor what cannot be drawn, and why."""
    try:
        yield
    except CannotDraw as problem:
        raise gr.Error(str(problem), print_exception=False) from problem


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        height=440,
        buttons=["download"],
        elem_id=name,
        elem_classes="picture",
    )


def _name_fields(pipeline: str, adapter: str) -> list[Any]:
    folders = {path for place in PLACES for path in (place / "shapes_world" / "adapters").glob("*/")}
    adapters = sorted({adapter} | {"/".join(path.parts[-3:]) for path in folders})
    info = "A folder or a Hub id"
    with gr.Accordion("Another model or adapter", open=False), gr.Row():
        return [
            gr.Textbox(pipeline, label="Pipeline", info=info, elem_id="pipeline"),
            gr.Dropdown(
                adapters, value=adapter, label="Adapter", info=info, allow_custom_value=True, elem_id="adapter_name"
            ),
        ]


def _fixed_names(pipeline: str, adapter: str) -> list[Any]:
    """States stay on the server: no visitor can name another model."""
    return [gr.State(pipeline), gr.State(adapter)]


def _defaults(pipe: Any) -> tuple[int, float]:
    """Returns the steps and the guidance scale that a pipeline takes unless told otherwise."""
    takes = inspect.signature(type(pipe).__call__).parameters
    defaults = {"num_inference_steps": 28, "guidance_scale": 5.0}
    defaults |= {name: takes[name].default for name in defaults if name in takes}
    return defaults["num_inference_steps"], defaults["guidance_scale"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pipeline = os.environ.get("SOFTREPA_SPACE_PIPELINE", PIPELINE)
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
