"""Edits pictures by text with FlowEdit, without and with an adapter, and lays the results side by side.

    python examples/edit.py --pipeline MODEL --image cat.png --source "a cat on a sofa" --target "a dog on a sofa" \
        --adapter ADAPTER --output edits

One source and one target prompt serve all images, or each image has its own. `edits/cat.png` then shows the image, the
edit of the base model and that of the adapter, from the same noise. The published adapters want less guidance than the
base model: `--adapter_target_guidance_scale 10` against the base's 13.5.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image, ImageDraw

from diffusers_softrepa import flow_edit

LABEL_HEIGHT = 14


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Edits what the command line says and returns the files written."""
    given = _parser().parse_args(arguments)
    pipe = DiffusionPipeline.from_pretrained(given.pipeline, dtype=getattr(torch, given.dtype))
    pipe.to(given.device)
    images = [load_image(path) for path in given.image]
    if given.adapter is not None:
        pipe.load_softrepa(given.adapter)
    settings: dict[str, Any] = {
        "negative_prompt": given.negative,
        "num_inference_steps": given.steps,
        "source_guidance_scale": given.source_guidance_scale,
        "generator": given.seed,
        "height": given.height,
        "width": given.width,
        "max_sequence_length": given.max_sequence_length,
    }
    prompts = (_one_each(given.source, images, "--source"), _one_each(given.target, images, "--target"))
    written = []
    for image, path, source, target in zip(images, given.image, *prompts, strict=True):
        (base,) = flow_edit(
            pipe,
            image,
            source,
            target,
            strength=given.strength,
            target_guidance_scale=given.target_guidance_scale,
            adapter_scope="none",
            **settings,
        )
        pictures = {"image": image.resize(base.size), "base": base}
        if given.adapter is not None:
            (pictures["adapter"],) = flow_edit(
                pipe,
                image,
                source,
                target,
                strength=given.adapter_strength or given.strength,
                target_guidance_scale=given.adapter_target_guidance_scale or given.target_guidance_scale,
                **settings,
            )
        written.append(_free_path(Path(given.output), Path(path).stem))
        side_by_side(pictures, f"{source} -> {target}").save(written[-1])
        print(written[-1])
    return written


def side_by_side(pictures: dict[str, Image.Image], title: str) -> Image.Image:
    """Returns pictures of one size in a row, the name of each above it and the title above all."""
    width, height = pictures["image"].size
    row = Image.new("RGB", (width * len(pictures), height + 2 * LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(row)
    draw.text((2, 1), title, fill="black")
    for column, (name, picture) in enumerate(pictures.items()):
        draw.text((column * width + 2, LABEL_HEIGHT + 1), name, fill="black")
        row.paste(picture, (column * width, 2 * LABEL_HEIGHT))
    return row


def _one_each(prompts: list[str], images: list[Image.Image], option: str) -> list[str]:
    if len(prompts) not in (1, len(images)):
        raise SystemExit(f"{option} needs one prompt for all images or one for each: {len(prompts)} for {len(images)}")
    return prompts * len(images) if len(prompts) == 1 else prompts


def _free_path(folder: Path, name: str) -> Path:
    """Returns a path that no picture of before has."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name, *(f"{name}-{number}" for number in range(1, 10_000))]
    return next(path for path in (folder / f"{candidate}.png" for candidate in names) if not path.exists())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pipeline", required=True, help="Hub id or folder of a flow-matching pipeline, such as SD3.")
    parser.add_argument("--image", required=True, nargs="+", help="Files or URLs.")
    parser.add_argument("--source", required=True, nargs="+", help="What the image shows, one for all or one each.")
    parser.add_argument("--target", required=True, nargs="+", help="What it shall show, one for all or one each.")
    parser.add_argument("--negative", help="Negative prompt; the pipeline's own unless given.")
    parser.add_argument("--adapter", help="Hub id, folder or file of soft tokens; without it only the base edits.")
    parser.add_argument("--output", default="edits", help="Folder for the pictures.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--strength", type=float, default=0.66, help="Share of the steps that run.")
    parser.add_argument("--adapter_strength", type=float, help="Of the adapter's edit; the base's unless given.")
    parser.add_argument("--source_guidance_scale", type=float, default=3.5)
    parser.add_argument("--target_guidance_scale", type=float, default=13.5)
    parser.add_argument("--adapter_target_guidance_scale", type=float, help="Of the adapter's edit; as the base's.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, help="In pixels; the image's unless given.")
    parser.add_argument("--width", type=int)
    parser.add_argument("--max_sequence_length", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
