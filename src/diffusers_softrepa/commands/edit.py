"""`softrepa edit`: edits images by text with FlowEdit, without and with an adapter.

    softrepa edit --pipeline MODEL --image cat.png --source "a cat on a sofa" --target "a dog on a sofa" \
        --adapter ADAPTER --output edits

Give one source and one target prompt for all images, or one of each for every image. `edits/cat.png` shows the image,
the edit with the base model and the edit with the adapter side by side, from the same noise. The published adapters
need less guidance than the base model: `--adapter_target_guidance_scale 10` instead of 13.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import load_image

from ..editing import flow_edit
from ..evaluation.images import grid
from ..evaluation.writing import save_image
from ..files import check_places
from .models import PipelineOptions, placed_pipeline
from .paths import free_path
from .settings import needed, option, parse, show


@dataclass
class EditOptions:
    """Options of the edit."""

    image: list[str] = needed("Images to edit: files or URLs.")
    source: list[str] = needed("What the image shows: one prompt for all images, or one for each.")
    target: list[str] = needed("What the edited image should show: one prompt for all images, or one for each.")
    negative: str | None = option("Negative prompt; the pipeline's own unless given.")
    adapter: str | None = option("Adapter: a folder, a file or a Hub id; without it only the base model edits.")
    output: str = option("Folder for the results.", "edits")
    steps: int = option("Sampling steps from noise to image, of which the last ones run.", 50)
    strength: float = option("Share of the steps that run; more changes more of the image.", 0.66)
    adapter_strength: float | None = option(
        "Strength of the edit with the adapter; that of the base model unless given."
    )
    source_guidance_scale: float = option("Guidance scale of the source prompt.", 3.5)
    target_guidance_scale: float = option("Guidance scale of the target prompt.", 13.5)
    adapter_target_guidance_scale: float | None = option(
        "Guidance scale of the target prompt with the adapter; that of the base model unless given."
    )
    seed: int = option("Seed of the noise, which is the same without and with the adapter.", 0)
    height: int | None = option("Height in pixels; the image's own unless given.")
    width: int | None = option("Width in pixels; the image's own unless given.")
    max_sequence_length: int | None = option("Number of text tokens per prompt; the pipeline's own unless given.")
    dry_run: bool = option("Print the settings and the files that would be written, and stop.", False)


MEANING = "Edits images by text with FlowEdit, without and with an adapter, side by side."
OPTIONS = (PipelineOptions, EditOptions)


def main(argv: Sequence[str]) -> list[Path]:
    """Edits the images, prints the paths of the files that were written, and returns them."""
    pipeline, given = parse("edit", MEANING, OPTIONS, argv)
    prompts = (_one_each(given.source, given.image, "--source"), _one_each(given.target, given.image, "--target"))
    if given.dry_run:
        files = [free_path(Path(given.output) / Path(path).stem, ".png") for path in given.image]
        print(f"{show(given)}\nwould write {', '.join(map(str, files))}")
        return []
    check_places(given.output, what="--output")
    images = [load_image(path) for path in given.image]
    pipe = placed_pipeline(pipeline)
    if given.adapter is not None:
        pipe.load_softrepa(given.adapter, token=pipeline.token)
    written = []
    for image, path, source, target in zip(images, given.image, *prompts, strict=True):
        (base,) = _edit(pipe, given, image, source, target, adapted=False)
        shown = {"image": image.resize(base.size), "base": base}
        if given.adapter is not None:
            (shown["adapter"],) = _edit(pipe, given, image, source, target, adapted=True)
        written.append(free_path(Path(given.output) / Path(path).stem, ".png"))
        sheet = grid([list(shown.values())], [f"{source} -> {target}"], list(shown), max_side=None)
        save_image(sheet, written[-1])
        print(written[-1])
    return written


def _edit(pipe: Any, given: EditOptions, image: Any, source: str, target: str, *, adapted: bool) -> Any:
    strength, guidance = given.strength, given.target_guidance_scale
    if adapted:
        strength = given.adapter_strength or strength
        guidance = given.adapter_target_guidance_scale or guidance
    return flow_edit(
        pipe,
        image,
        source,
        target,
        negative_prompt=given.negative,
        num_inference_steps=given.steps,
        strength=strength,
        source_guidance_scale=given.source_guidance_scale,
        target_guidance_scale=guidance,
        generator=given.seed,
        height=given.height,
        width=given.width,
        max_sequence_length=given.max_sequence_length,
        adapter_scope="both" if adapted else "none",
    )


def _one_each(prompts: list[str], images: list[str], option: str) -> list[str]:
    if len(prompts) not in (1, len(images)):
        raise ValueError(f"{option} needs one prompt for all images or one for each: {len(prompts)} for {len(images)}")
    return prompts * len(images) if len(prompts) == 1 else prompts
