"""The oracle: reads the things in an image of the shapes world and says whether a caption is true of it.

It knows the palette and the shapes, nothing else: the background is taken from the border of the image, colours by
the mixture of background and ink that explains a pixel best, things as connected patches of one colour, and shapes by
the drawn shape that overlaps a patch most.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shapes_world.world import COLORS, SHAPES, SIZE, Ask, Thing, coverage

MIN_AREA = 10  # pixels; smaller patches are specks
_MIDDLE = slice(SIZE // 2 - 8, SIZE // 2 + 8)  # where a shape in the middle of an image is
MIN_OVERLAP = 0.6  # intersection over union below which a patch is no known shape

_PALETTE = np.asarray(list(COLORS.values()), dtype=float)
_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Reading:
    """What the oracle sees.

    Attributes:
        things: What it made out.
        quality: Overlap of each with the ideal shape, 0..1.
        unclear: Patches that are no known shape.
    """

    things: tuple[Thing, ...]
    quality: tuple[float, ...]
    unclear: int


@dataclass(frozen=True)
class Verdict:
    """What it says about an image and its caption.

    Attributes:
        correct: The caption is exactly true.
        quality: Mean overlap of all patches with known shapes, unclear ones counting 0; 1 without any patch.
        counted: How many patches there are more than asked for; negative when fewer.
    """

    correct: bool
    quality: float
    counted: int


def read(image: Image.Image) -> Reading:
    """Reads a 32 x 32 image."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    if pixels.shape[:2] != (SIZE, SIZE):
        raise ValueError(f"the oracle reads {SIZE} x {SIZE} images, but this is {image.width} x {image.height}")
    labels, share = _colors(pixels)
    things, quality, unclear = [], [], 0
    for color in range(len(_NAMES)):
        for patch in _patches((labels == color) & (share > 0.5)):
            shape, x, y, radius, overlap = _best_shape(np.where(_grown(patch), share, 0))
            if overlap < MIN_OVERLAP:
                unclear += 1
            else:
                things.append(Thing(_NAMES[color], shape, x, y, radius))
                quality.append(overlap)
    return Reading(tuple(things), tuple(quality), unclear)


def judge(image: Image.Image, ask: Ask) -> Verdict:
    """Reads an image and compares it with what was asked."""
    reading = read(image)
    patches = len(reading.things) + reading.unclear
    return Verdict(
        correct=reading.unclear == 0 and ask.true_of(reading.things),
        quality=sum(reading.quality) / patches if patches else 1.0,
        counted=patches - sum(want.count for want in ask.wants),
    )


def accuracy(images: Sequence[Image.Image], asks: Sequence[Ask]) -> dict[str, float]:
    """Returns the share of true captions by skill, and `total`, the mean of the skills."""
    correct: dict[str, list[bool]] = {}
    for image, ask in zip(images, asks, strict=True):
        correct.setdefault(ask.skill, []).append(judge(image, ask).correct)
    table = {skill: sum(values) / len(values) for skill, values in correct.items()}
    return {**table, "total": sum(table.values()) / len(table)}


def _colors(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the colour of each pixel, a palette index, and how much of it there is, 0..1; each (32, 32)."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    ink = _PALETTE - background  # (colours, 3)
    offset = (pixels - background)[..., None, :]  # (32, 32, 1, 3)
    share = ((offset * ink).sum(-1) / (ink**2).sum(-1)).clip(0, 1)
    residual = ((offset - share[..., None] * ink) ** 2).sum(-1)
    best = residual.argmin(-1)
    return best, np.take_along_axis(share, best[..., None], -1)[..., 0]


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """Returns the connected patches of a mask that are no specks, each (32, 32)."""
    left, found = mask.copy(), []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        patch, todo = np.zeros_like(mask), [start]
        left[start] = False
        while todo:
            y, x = todo.pop()
            patch[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= near[0] < SIZE and 0 <= near[1] < SIZE and left[near]:
                    left[near] = False
                    todo.append(near)
        if patch.sum() >= MIN_AREA:
            found.append(patch)
    return found


@functools.cache
def _drawn() -> tuple[list[tuple[str, float, float, float]], np.ndarray]:
    """Returns shapes at all sizes near the middle of an image, and their coverage, (shapes, 16 * 16)."""
    steps, middle = (-0.5, -0.25, 0.0, 0.25, 0.5), SIZE / 2
    keys = [
        (shape, middle + dx, middle + dy, radius)
        for shape in SHAPES
        for radius in np.arange(3.75, 5.75, 0.25)
        for dx in steps
        for dy in steps
    ]
    return keys, np.stack([coverage(*key)[_MIDDLE, _MIDDLE].ravel() for key in keys]).astype(np.float32)


def _best_shape(ink: np.ndarray) -> tuple[str, float, float, float, float]:
    """Returns shape, centre, radius and overlap of the drawn shape that is most like a patch of ink, (32, 32)."""
    rows, columns = np.nonzero(ink > 0.5)
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    best = ("", 0.0, 0.0, 0.0, -1.0)
    for lift in (0, 1):  # the middle of a triangle is lower than that of the box around it
        right, down = SIZE // 2 - round(x), SIZE // 2 - round(y + 0.5 * lift)
        window = _shifted(ink, right, down)[_MIDDLE, _MIDDLE].ravel()
        keys, drawn = _drawn()
        common = np.minimum(drawn, window).sum(-1)
        overlap = common / (drawn.sum(-1) + ink.sum() - common)
        index = int(overlap.argmax())
        if overlap[index] > best[-1]:
            shape, cx, cy, radius = keys[index]
            best = (shape, cx - right, cy - down, float(radius), float(overlap[index]))
    return best


def _shifted(image: np.ndarray, right: int, down: int) -> np.ndarray:
    moved = np.zeros_like(image, dtype=np.float32)
    height, width = SIZE - abs(down), SIZE - abs(right)
    source = image[max(0, -down) :, max(0, -right) :][:height, :width]
    moved[max(0, down) :, max(0, right) :][:height, :width] = source
    return moved


def _grown(patch: np.ndarray) -> np.ndarray:
    """Returns a patch with its neighbours."""
    grown = patch.copy()
    grown[1:] |= patch[:-1]
    grown[:-1] |= patch[1:]
    grown[:, 1:] |= grown[:, :-1].copy()
    grown[:, :-1] |= grown[:, 1:].copy()
    return grown
