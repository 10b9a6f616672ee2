"""`softrepa generate`: draws prompts without and with an adapter, from the same noise, as a grid in one PNG.

softrepa generate --pipeline MODEL --adapter FOLDER --prompt "a red cat on a blue sofa" --out cat.png
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.images import grid
from ..evaluation.settings import left_as_found
from ..evaluation.writing import save_image
from .models import PipelineOptions, placed_pipeline
from .paths import free_path
from .settings import check_texts, needed, option, parse, show


@dataclass
class GenerateOptions:
    """Options of the drawing."""

    prompt: list[str] = needed("Prompts; each is a row of the grid.")
    adapter: str | None = option("Adapter: a folder, a file or a Hub id; without it only the base model draws.")
    weight: float = option("Weight of the adapter; 0 is the base model.", 1.0)
    out: str = option("PNG file to write; a number is added to its name if the file exists.", "generated.png")
    seed: int = option("Seed of the noise, which is the same without and with the adapter.", 0)
    steps: int | None = option("Sampling steps; the pipeline's own number unless given.")
    guidance: float | None = option("Guidance scale; the pipeline's own unless given.")
    negative_prompt: str | None = option("Negative prompt; none unless given.")
    height: int | None = option("Height in pixels; the pipeline's own unless given.")
    width: int | None = option("Width in pixels; the pipeline's own unless given.")
    max_sequence_length: int | None = option("Number of text tokens per prompt; the pipeline's own unless given.")
    dry_run: bool = option("Print the settings and the file that would be written, and stop.", False)


MEANING = "Draws prompts without and with an adapter from the same noise, side by side."
OPTIONS = (PipelineOptions, GenerateOptions)


def main(argv: Sequence[str]) -> None:
    """Draws the grid and prints the path of its file."""
    pipeline, given = parse("generate", MEANING, OPTIONS, argv)
    check_texts(given, "prompt", "negative_prompt")
    path = free_path(given.out, ".png")
    if given.dry_run:
        print(f"{show(given)}\nwould write {path}")
        return
    pipe = placed_pipeline(pipeline)
    call = _call(pipe, given)
    columns = ["base"]
    if given.adapter is not None:
        name = pipe.load_softrepa(given.adapter, token=pipeline.token)
        pipe.set_softrepa(name, given.weight)
        columns.append("adapter" if given.weight == 1 else f"adapter at {given.weight:g}")
    rows = []
    with left_as_found(pipe):
        for prompt in given.prompt:
            rows.append(
                [_draw(pipe, prompt, given.seed, call, adapted=bool(column)) for column in range(len(columns))]
            )
    path = free_path(given.out, ".png")  # again: another process may have taken the name while this one drew
    save_image(grid(rows, given.prompt, columns, max_side=None), path)
    print(path)


def _call(pipe: Any, given: GenerateOptions) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call.

    Raises:
        ValueError: An option was given for which the pipeline has no argument.
    """
    call = {
        "num_inference_steps": given.steps,
        "guidance_scale": given.guidance,
        "negative_prompt": given.negative_prompt,
        "height": given.height,
        "width": given.width,
        "max_sequence_length": given.max_sequence_length,
    }
    call = {name: value for name, value in call.items() if value is not None}
    taken = inspect.signature(pipe.__call__).parameters
    foreign = [name for name in call if name not in taken]
    if foreign:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(foreign)}; leave it out")
    return call


def _draw(pipe: Any, prompt: str, seed: int, call: dict[str, Any], *, adapted: bool) -> Any:
    if adapted:
        pipe.enable_softrepa()
    elif pipe.get_softrepa_adapters():
        pipe.disable_softrepa()
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
