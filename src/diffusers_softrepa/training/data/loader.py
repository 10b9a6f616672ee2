"""The batches of loaded examples of one process, read ahead by threads, and resumable at any batch.

`sampler` decides what is in a batch by hashes and not by a random state, so the position in the data is two numbers:
the epoch and the batches taken from it. Caption, crop and flip of a row are drawn from (seed, epoch, number of the
example or content of the image).

Threads load, not processes: Pillow decodes and resizes without Python's lock, broken images are counted in one place,
nothing is copied between processes, and a signal to the process group ends no worker.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import groupby, islice
from typing import Any, final

import torch
from torch import Tensor

from .cache import TensorCache
from .dataset import Example, Examples
from .image import BrokenExample, Framing, Size, content_id, decode, fetch, image_size, render
from .sampler import BrokenCount, PairSampler, Slot, draw, draw_uniform

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 3


@final
@dataclass(eq=False)
class PairLoader:
    """The batches of one process, each a list of loaded examples of one size.

    Iterating yields the rest of the current epoch; iterating again yields the next epoch. Process r gets rows
    r * batch_size to (r + 1) * batch_size of a global batch of batch_size * world_size rows, which is the same for any
    number of processes. Each process reads the whole stream but decodes only its own rows.

    Attributes:
        examples: Examples from `open_examples`.
        framing: Size and crop of the pixels.
        batch_size: Rows of a batch of one process.
        seed: Seed of all draws; defaults to 0.
        rank: Number of this process; defaults to 0.
        world_size: Number of processes; defaults to 1.
        shuffle: Whether to draw the order; defaults to True.
        shuffle_buffer: Examples of a stream that are held in memory, not decoded, and permuted; defaults to 1000.
        max_broken: Broken examples of an epoch that are replaced before an error: a number, or a share of the
            examples; defaults to 0.01.
        num_workers: Threads that load ahead, 0 to load when asked; defaults to 2.
        latents: Cache of latents to read instead of images, which `fill_latents` fills with each image as it is
            cropped and flipped in epoch 0; images that are not in it count as broken. Defaults to None.
        empty_prompts: Share of the images, drawn per image and epoch, that get an empty caption; defaults to 0.
        epoch: The current epoch.
        batches: Number of batches that were taken from it.
        broken: Counter of the broken examples that this process found in it.
        order: The sampler of the global batches.

    Raises:
        ValueError: `max_broken` is out of range, or the examples do not fill a batch. A stream that is too short for
            one batch raises it when it ends.
    """

    examples: Examples
    framing: Framing
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    shuffle_buffer: int = 1000
    max_broken: int | float = 0.01
    num_workers: int = 2
    latents: TensorCache | None = None
    empty_prompts: float = 0.0
    epoch: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.broken, size = BrokenCount(self.max_broken), self.batch_size * self.world_size
        order_seed = self.seed if self.shuffle else None
        self.order = PairSampler(self.examples, self.framing, size, order_seed, self.shuffle_buffer, self.broken)

    def __iter__(self) -> Iterator[list[Example]]:
        epoch, start = self.epoch, self.batches
        self.broken.names.clear()
        rows = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        own = (slots[rows] for slots in islice(self.order.batches(epoch), start, None))
        for batch in self._load_ahead(own, epoch):
            self.batches += 1
            yield batch
        if start == self.batches == 0:
            raise ValueError(
                f"the stream ended before it filled a batch of {self.order.batch_size}; use smaller batches"
            )
        self.epoch, self.batches = epoch + 1, 0

    def __len__(self) -> int:
        """Returns the batches of a whole epoch; raises TypeError for a stream."""
        return len(self.order)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the data, and the settings that it depends on."""
        return {"epoch": self.epoch, "batches": self.batches, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position without decoding the images before it; a stream is read up to there.

        Args:
            state: The state from `state_dict()`, or `epoch` and `batches` alone.

        Raises:
            ValueError: The state was saved under other settings, so that the position means other examples.
        """
        own = self._settings()
        other = {name: (state[name], own[name]) for name in own if name in state and state[name] != own[name]}
        if other:
            raise ValueError(
                f"the position in the data was saved under other settings (saved, now): {other}; go on with the saved "
                "ones, or begin an epoch with load_state_dict({'epoch': ..., 'batches': 0})"
            )
        self.epoch, self.batches = int(state["epoch"]), int(state["batches"])

    def fill_latents(
        self, encode: Callable[[Tensor], Mapping[str, Tensor]], *, stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Encodes the images that the cache of latents lacks, a share in each process; equal images once.

        Args:
            encode: Function from pixels (n, 3, H, W) in [-1, 1] to named tensors (n, ...), such as the VAE's moments.
            stop: Function that is called before each image and batch; filling stops where it returns True.

        Returns:
            How many entries this process wrote.

        Raises:
            CacheTooLarge: The entries would not fit.
            ValueError: The examples are a stream, or more images are broken than `max_broken`.
        """
        if self.examples.count is None:
            raise ValueError("a cache of latents needs a data set of known length; encode a stream as it comes")
        assert self.latents is not None
        logger.info("reading %d images for the cache of latents", len(self.examples))
        self.broken.names.clear()
        found: dict[str, tuple[Size, int]] = {}
        for example in map(self.examples.__getitem__, range(len(self.examples))):
            if stop():
                return 0
            try:
                fetched = fetch(example.image)
                for size in self.framing.sizes_of(image_size(fetched)):
                    found.setdefault(_latents_name(content_id(fetched), size), (size, example.number))
            except BrokenExample as error:
                self.broken.add(example, error, out_of=len(self.examples))

        def compute(names: list[str]) -> dict[str, dict[str, Tensor]]:
            pixels: dict[str, Tensor] = {}
            for name in names:
                size, number = found[name]
                example = self.examples[number]
                try:
                    fetched = fetch(example.image)
                    pixels[name] = self._pixels(fetched, size, content_id(fetched))
                except BrokenExample as error:
                    self.broken.add(example, error, out_of=len(self.examples))
            entries: dict[str, dict[str, Tensor]] = {}
            for _, group in groupby(pixels, key=lambda name: found[name][0]):
                alike = list(group)
                encoded = encode(torch.stack([pixels[name] for name in alike]))
                entries |= {name: {key: encoded[key][row] for key in encoded} for row, name in enumerate(alike)}
            return entries

        names = sorted(found, key=lambda name: found[name])  # those of a size after another
        return self.latents.fill(names, compute, rank=self.rank, world_size=self.world_size, stop=stop)

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shuffle_buffer": self.shuffle_buffer if self.examples.count is None else None,
            "global_batch_size": self.order.batch_size,
            "num_examples": self.examples.count,
            "weights": [weight for _, weight in self.examples.weights],
            "sizes": [list(size) for size in self.framing.sizes],
        }

    def _load_ahead(self, order: Iterator[list[Slot]], epoch: int) -> Iterator[list[Example]]:
        if self.num_workers == 0:
            yield from ([self._load(slot, epoch) for slot in slots] for slots in order)
            return
        workers = ThreadPoolExecutor(self.num_workers)
        try:
            batches = ([workers.submit(self._load, slot, epoch) for slot in slots] for slots in order)
            started = deque(islice(batches, _BATCHES_AHEAD))
            while started:
                yield [row.result() for row in started.popleft()]
                started.extend(islice(batches, 1))
        finally:
            workers.shutdown(cancel_futures=True)

    def _load(self, slot: Slot, epoch: int) -> Example:
        """Loads a row, or the first of its replacements that is not broken."""
        start, examples = slot.block
        for place, time in slot.candidates():
            example = examples[place]
            try:
                return self._read(example, slot.size, epoch, time)
            except BrokenExample as error:
                self.broken.add(example, error, out_of=(start + len(examples)) / self.world_size)
        raise ValueError(f"none of {len(slot.order)} examples of size {slot.size} can be used; see the warnings")

    def _read(self, example: Example, size: Size, epoch: int, time: int) -> Example:
        """Returns the example with a caption and pixels or latents, as it comes for the `time`-th time in an epoch.

        Raises:
            BrokenExample: There is no caption, or the image cannot be read or is not in the cache of latents.
        """
        fetched = fetch(example.image)
        if not example.captions:
            raise BrokenExample("it has no caption that can be read: none, empty, or with half of a character in it")
        key = (self.seed, epoch, example.number, *([time] if time else []))
        caption, *others = example.captions
        if others:
            caption = example.captions[draw(*key, "caption") % len(example.captions)]
        if self.empty_prompts and draw_uniform(*key, "empty") < self.empty_prompts:
            caption = ""
        identity, pixels, latents = content_id(fetched), None, None
        if self.latents is None:
            pixels = self._pixels(fetched, size, identity, epoch, time)
        elif (latents := self.latents.get(_latents_name(identity, size))) is None:
            raise BrokenExample("its latents are not in the cache: it was broken, or not there, when that was filled")
        drawn: Any = {"caption": caption, "pixels": pixels, "latents": latents, "image_id": identity, "size": size}
        return replace(example, image=None, **drawn)

    def _pixels(self, fetched: Any, size: Size, identity: int, epoch: int = 0, time: int = 0) -> Tensor:
        key = (self.seed, epoch, identity, *([time] if time else []))
        crop_at = draw_uniform(*key, "crop") if self.framing.random_crop else 0.5
        flip = self.framing.flip and draw_uniform(*key, "flip") < 0.5
        return render(decode(fetched), size, crop_at=crop_at, flip=flip)


def _latents_name(image_id: int, size: Size) -> str:
    return f"image-{image_id:016x}-{size[0]}x{size[1]}"
