"""One example becomes one row of a batch: a caption drawn, an image decoded and framed, or its latents looked up.

The caption is drawn from (seed, epoch, number of the example), crop and flip from (seed, epoch, content of the image).
A latent cache holds every image once, as it is framed in epoch 0, under `image_name` of its content: so a random crop
or flip is the same in every epoch, and the same image in several rows or files is encoded once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import final

import torch
from torch import Tensor

from .cache import Entry, TensorCache, fill
from .data import Example, Examples
from .images import BrokenExample, Frame, Framing, Size, content_id, decode, fetch, image_size, place_frame, render
from .plan import BrokenCount, draw, draw_uniform

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Row:
    """One row of a `Batch`; its attributes are described there."""

    pixels: Tensor | None
    latents: Entry | None
    caption: str
    negative_captions: list[str]
    image_id: int
    original_size: Size
    crop_top_left: Size
    name: str


@final
@dataclass(frozen=True)
class RowReader:
    """Makes rows of examples.

    Attributes:
        framing: Size and crop of the pixels.
        seed: Of all draws.
        latents: Cache of latents to read instead of decoding images.
    """

    framing: Framing
    seed: int
    latents: TensorCache | None = None

    def read(self, example: Example, *, number: int, epoch: int, size: Size) -> Row:
        """Makes a row.

        Args:
            example: Of the row.
            number: Of the example in the data set (of a stream: in the epoch).
            epoch: Of the draws.
            size: Of the pixels, (H, W).

        Raises:
            BrokenExample: It has no caption, its image cannot be read, or is not in the cache of latents.
        """
        fetched = fetch(example.image)
        if not example.captions:
            raise BrokenExample("it has no caption")
        caption = example.captions[draw(self.seed, epoch, number, "caption") % len(example.captions)]
        identity = content_id(fetched)
        pixels, latents = None, None
        if self.latents is None:
            image = decode(fetched)
            frame = self._frame((image.height, image.width), size, identity, epoch)
            pixels = render(image, frame)
        else:
            frame = self._frame(image_size(fetched), size, identity, epoch=0)
            latents = self.latents.get(image_name(identity))
            if latents is None:
                raise BrokenExample(
                    "its latents are not in the cache: it was broken, or not there, when that was filled"
                )
        return Row(
            pixels,
            latents,
            caption,
            list(example.negative_captions),
            identity,
            frame.original_size,
            frame.crop_top_left,
            example.name,
        )

    def cached_pixels(self, example: Example) -> Tensor:
        """The pixels that the cache of latents holds the latents of, (3, H, W); errors as `read`."""
        fetched = fetch(example.image)
        image, size = decode(fetched), self.framing.size_of(image_size(fetched))
        return render(image, self._frame((image.height, image.width), size, content_id(fetched), epoch=0))

    def _frame(self, original: Size, size: Size, identity: int, epoch: int) -> Frame:
        return place_frame(
            original,
            size,
            self.framing,
            crop_at=draw_uniform(self.seed, epoch, identity, "crop"),
            flip_at=draw_uniform(self.seed, epoch, identity, "flip"),
        )


def image_name(image_id: int) -> str:
    """The name of an image in a cache of latents."""
    return f"image-{image_id:016x}"


def fill_latents(
    cache: TensorCache,
    examples: Examples,
    framing: Framing,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    batch_size: int,
    seed: int = 0,
    max_broken: int | float = 0.01,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Encodes the images that the cache lacks; `PairLoader(latents=cache)` reads them.

    Args:
        cache: Its settings hold `framing.settings(seed)` and `model_fingerprint(vae)` at least.
        examples: Not a stream.
        framing: As the loader's.
        encode: From pixels (n, 3, H, W) in [-1, 1] to named tensors (n, ...), such as the moments of the VAE.
        batch_size: Images per call of `encode`.
        seed: As the loader's.
        max_broken: Broken images that are left out before an error: a number, or a share.
        rank: Of this process.
        world_size: Processes that fill the cache together.

    Returns:
        How many entries this process wrote.

    Raises:
        CacheTooLarge: They would not fit.
        ValueError: It is a stream, or more images are broken than `max_broken`.
    """
    if examples.count is None:
        raise ValueError("a cache of latents needs a data set of known length; encode a stream as it comes")
    (block,) = examples.blocks(block_size=1)
    reader, broken = RowReader(framing, seed), BrokenCount(max_broken)
    logger.info("looking through %d images for the cache of latents", block.size)
    found: dict[str, tuple[Size, int]] = {}
    for place in range(block.size):
        example = block.read(place)
        with broken.skipping(example.name, out_of=block.size):
            fetched = fetch(example.image)
            found.setdefault(image_name(content_id(fetched)), (framing.size_of(image_size(fetched)), place))

    def compute(names: list[str]) -> list[Entry | None]:
        entries: dict[str, Entry] = {}
        for _, group in groupby(names, key=lambda name: found[name][0]):
            pixels = {}
            for name in group:
                example = block.read(found[name][1])
                with broken.skipping(example.name, out_of=block.size):
                    pixels[name] = reader.cached_pixels(example)
            if pixels:
                encoded = encode(torch.stack(list(pixels.values())))
                entries |= {name: {key: encoded[key][row] for key in encoded} for row, name in enumerate(pixels)}
        return [entries.get(name) for name in names]

    by_size = sorted(found, key=lambda name: found[name])
    return fill(cache, by_size, compute, batch_size=batch_size, rank=rank, world_size=world_size)
