"""Draws asks with the base pipeline and measures what comes out."""

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps

from shapes_world.models import MAX_WORDS
from shapes_world.oracle import judge
from shapes_world.world import SIZE, SKILLS, Ask

FOLDER = Path(os.path.relpath(Path(__file__).parent))  # files that are written carry no path of this machine
BASE = FOLDER / "sd3"
STEPS = 14
RIGHT, WRONG = (46, 160, 67), (215, 58, 73)  # of the frames around images
_FRAME = 3


@dataclass(frozen=True)
class Measured:
    """What one setting drew of one set of asks.

    Attributes:
        correct: By the oracle, (asks,) bool.
        quality: Overlap of what was drawn with ideal shapes, (asks,).
        counted: How many things too many, (asks,).
        features: Of the images, (asks, 128): latents of the autoencoder, averaged over 2 x 2.
    """

    correct: np.ndarray
    quality: np.ndarray
    counted: np.ndarray
    features: np.ndarray

    def accuracy(self, asks: Sequence[Ask]) -> dict[str, float]:
        """Returns the share of correct images by skill, and `total`, the mean of the skills."""
        table = {
            skill: float(np.mean([c for c, ask in zip(self.correct, asks, strict=True) if ask.skill == skill]))
            for skill in SKILLS
        }
        return {**table, "total": float(np.mean(list(table.values())))}


def load_base(path: Path | str = BASE) -> StableDiffusion3Pipeline:
    """Loads the embedded pipeline in single precision; it reports no progress."""
    pipe = StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: StableDiffusion3Pipeline,
    asks: Sequence[Ask],
    *,
    guidance: float = 3.0,
    seed: int = 0,
    steps: int = STEPS,
    batch: int = 70,
) -> list[Image.Image]:
    """Draws every ask once. The noise of an image depends on the seed and its place alone."""
    images: list[Image.Image] = []
    for start in range(0, len(asks), batch):
        some = asks[start : start + batch]
        noise = [torch.Generator().manual_seed(1000 * seed + start + row) for row in range(len(some))]
        images += pipe(
            [ask.caption for ask in some],
            guidance_scale=guidance,
            num_inference_steps=steps,
            max_sequence_length=MAX_WORDS,
            generator=noise,
        ).images
    return images


def measure(pipe: StableDiffusion3Pipeline, images: Sequence[Image.Image], asks: Sequence[Ask]) -> Measured:
    """Reads images by the oracle and by the autoencoder."""
    verdicts = [judge(image, ask) for image, ask in zip(images, asks, strict=True)]
    return Measured(
        np.array([verdict.correct for verdict in verdicts]),
        np.array([verdict.quality for verdict in verdicts]),
        np.array([verdict.counted for verdict in verdicts]),
        features(pipe, images),
    )


def right(images: Sequence[Image.Image], asks: Sequence[Ask]) -> np.ndarray:
    """Returns 1 for each image that shows exactly what was asked, by the oracle, and 0 for the others, (asks,)."""
    return np.array([float(judge(image, ask).correct) for image, ask in zip(images, asks, strict=True)])


def gain(after: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """Returns by how many points more is right, and the standard error of that, both in per cent of the prompts.

    Args:
        after: What `right` says of images in one setting, (asks,).
        before: What it says of the same asks from the same noise in another one, (asks,).
    """
    return mean_and_error(100 * (after - before))


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the mean of values (n,) and its standard error, which is NaN for a single value."""
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def as_input(images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns images as the autoencoder reads them, (images, 3, 32, 32) in -1..1."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def features(pipe: StableDiffusion3Pipeline, images: Sequence[Image.Image]) -> np.ndarray:
    """Returns the embedding in which images are compared as sets, (images, 128)."""
    latents = [pipe.vae.encode(part).latent_dist.mode() for part in as_input(images).split(128)]
    return torch.nn.functional.avg_pool2d(torch.cat(latents), 2).flatten(1).numpy()


def framed(columns: dict[str, Sequence[Sequence[Image.Image]]], asks: Sequence[Ask], scale: int = 3) -> Image.Image:
    """Returns one image: a row for each ask, and for each name the images drawn of it, framed by the oracle.

    Args:
        columns: By name, for each ask the images of one or more seeds.
        asks: What was asked.
        scale: Enlargement.
    """
    side, words, gap, top, line = SIZE * scale + 2 * _FRAME, 240, 24, 30, 21
    widths = [max(len(images) for images in rows) * (side + 2) + gap for rows in columns.values()]
    canvas = Image.new("RGB", (words + sum(widths), top + len(asks) * (side + 6)), "white")
    pen: Any = ImageDraw.Draw(canvas)
    font: Any = ImageFont.load_default(17)
    for column, (name, rows) in enumerate(columns.items()):
        left = words + sum(widths[:column])
        pen.text((left, 4), name, fill="black", font=font)
        for row, (ask, images) in enumerate(zip(asks, rows, strict=True)):
            for place, image in enumerate(images):
                color = RIGHT if judge(image, ask).correct else WRONG
                large = image.resize((SIZE * scale,) * 2, Image.Resampling.NEAREST)
                canvas.paste(
                    ImageOps.expand(large, _FRAME, color), (left + place * (side + 2), top + row * (side + 6))
                )
    for row, ask in enumerate(asks):
        lines = textwrap.wrap(ask.caption, 26)
        height = top + row * (side + 6) + (side - line * len(lines)) // 2
        for number, text in enumerate(lines):
            pen.text((6, height + line * number), text, fill="black", font=font)
    return canvas


def side_by_side(columns: dict[str, Sequence[Image.Image]], captions: Sequence[str], scale: int = 3) -> Image.Image:
    """Returns one image: a row for each caption, a column for each name."""
    side, words, gap = SIZE * scale, 300, 6
    canvas = Image.new("RGB", (words + len(columns) * (side + gap), 20 + len(captions) * (side + gap)), "white")
    pen: Any = ImageDraw.Draw(canvas)
    for column, (name, images) in enumerate(columns.items()):
        pen.text((words + column * (side + gap) + 2, 4), name, fill="black")
        for row, image in enumerate(images):
            large = image.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(large, (words + column * (side + gap), 20 + row * (side + gap)))
    for row, caption in enumerate(captions):
        pen.text((6, 20 + row * (side + gap) + side // 2 - 6), caption, fill="black")
    return canvas
