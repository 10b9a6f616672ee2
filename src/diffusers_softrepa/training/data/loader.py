"""The batches of loaded examples of one process, read ahead by threads, and resumable at any batch.

`sampler` decides what is in a batch by hashes and not by a random state, so the position in the data is two numbers:
the epoch and the batches taken from it. Caption, crop and flip of a row are drawn from (seed, epoch, number of the
example or content of the image).

Threads load, not processes: Pillow decodes and resizes without Python's lock, broken images are counted in one place,
nothing is copied between processes, and a signal to the process group ends no worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, final

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .cache import TensorCache
from .dataset import Example, Examples
from .image import BrokenExample, Framing, Size, content_id, decode, fetch, place_frame, render
from .sampler import BrokenCount, PairSampler, Slot, draw, draw_uniform


@final
@dataclass(frozen=True)
class Reader:
    """Loads an example: draws its caption, and decodes and crops its image or reads its latents from a cache.

    Attributes:
        framing: Size and crop of the pixels.
        seed: Seed of all draws.
        latents: Cache of latents to read instead of images; defaults to None. It holds each image with the crop and
            flip of epoch 0.
        empty_prompts: Share of the images, drawn per image and epoch, that get an empty caption; defaults to 0.
    """

    framing: Framing
    seed: int
    latents: TensorCache | None = None
    empty_prompts: float = 0.0

    def load(self, example: Example, *, number: int, epoch: int, size: Size, time: int = 0) -> Example:
        """Returns the example with caption and pixels or latents.

        Args:
            example: The stored example.
            number: Number of the example in the data set, or in the epoch of a stream.
            epoch: The epoch.
            size: Size (H, W) of the pixels.
            time: How often the example has come before in this epoch; defaults to 0.

        Raises:
            BrokenExample: There is no caption, or the image cannot be read or is not in the cache of latents.
        """
        fetched = fetch(example.image)
        if not example.captions:
            raise BrokenExample("it has no caption that can be read: none, empty, or with half of a character in it")
        key = (self.seed, epoch, number, *([time] if time else []))
        several = len(example.captions) > 1
        caption = example.captions[draw(*key, "caption") % len(example.captions) if several else 0]
        if self.empty_prompts and draw_uniform(*key, "empty") < self.empty_prompts:
            caption = ""
        identity = content_id(fetched)
        pixels, latents = None, None
        if self.latents is None:
            pixels = self._pixels(fetched, size, identity, epoch, time)
        elif (latents := self.latents.get(self.latents_name(identity, size))) is None:
            raise BrokenExample("its latents are not in the cache: it was broken, or not there, when that was filled")
        loaded: dict[str, Any] = {"pixels": pixels, "latents": latents, "image_id": identity, "size": size}
        return replace(example, image=None, caption=caption, **loaded)

    def cached_pixels(self, example: Example, size: Size) -> Tensor:
        """Returns the pixels (3, H, W) whose latents a cache holds; errors as in `load`."""
        fetched = fetch(example.image)
        return self._pixels(fetched, size, content_id(fetched), epoch=0)

    def latents_name(self, image_id: int, size: Size) -> str:
        """Returns the name of an image in a cache of latents, with its size where images have several."""
        name = f"image-{image_id:016x}"
        return f"{name}-{size[0]}x{size[1]}" if self.framing.further_resolutions else name

    def _pixels(self, fetched: bytes | Image.Image, size: Size, identity: int, epoch: int, time: int = 0) -> Tensor:
        image, framing = decode(fetched), self.framing
        key = (self.seed, epoch, identity, *([time] if time else []))
        crop_at = draw_uniform(*key, "crop") if framing.crop == "random" else 0.5
        flip_at = draw_uniform(*key, "flip") if framing.flip else 1.0
        frame = place_frame((image.height, image.width), size, framing, crop_at=crop_at, flip_at=flip_at)
        return render(image, frame)


@final
class PairLoader(DataLoader[list[Example]]):
    """The batches of one process, each a list of loaded examples of one size.

    Iterating yields the rest of the current epoch; iterating again yields the next epoch. Process r gets rows
    r * batch_size to (r + 1) * batch_size of a global batch of batch_size * world_size rows, which is the same for any
    number of processes. Each process reads the whole stream but decodes only its own rows.

    Args:
        examples: Examples from `open_examples`.
        framing: Size and crop of the pixels.
        batch_size: Rows of a batch of one process.
        seed: Seed of all draws; defaults to 0.
        rank: Number of this process; defaults to 0.
        world_size: Number of processes; defaults to 1.
        shuffle: Whether to draw the order; defaults to True.
        shuffle_buffer: Examples of a stream that are held in memory, not decoded, and permuted; defaults to 1000.
        drop_last: Whether to leave out the rows that do not fill a batch at the end of an epoch; defaults to True.
        max_broken: Broken examples of an epoch that are replaced before an error: a number, or a share of the
            examples; defaults to 0.01.
        num_workers: Threads that load ahead, 0 to load when asked; defaults to 2.
        prefetch: Batches to load ahead; defaults to 2.
        latents: Cache filled by `encode.fill_latents`; images that are not in it count as broken.
        empty_prompts: Share of the images that get an empty caption; defaults to 0.

    Raises:
        ValueError: A setting is out of range, or the examples do not fill a batch. A stream that is too short for one
            batch raises it when it ends.
    """

    def __init__(
        self,
        examples: Examples,
        framing: Framing,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        shuffle_buffer: int = 1000,
        drop_last: bool = True,
        max_broken: int | float = 0.01,
        num_workers: int = 2,
        prefetch: int = 2,
        latents: TensorCache | None = None,
        empty_prompts: float = 0.0,
    ) -> None:
        _check_at_least(1, batch_size=batch_size, shuffle_buffer=shuffle_buffer, prefetch=prefetch)
        _check_at_least(0, num_workers=num_workers)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size - 1 but got rank {rank} of {world_size}")
        if world_size > 1 and not drop_last:
            raise ValueError("several processes need drop_last=True, or some would have no row of the last batch")
        self.rows = slice(rank * batch_size, (rank + 1) * batch_size)
        self.world_size, self._threads, self._prefetch = world_size, num_workers, prefetch
        self.epoch, self.batches = 0, 0
        self._broken = BrokenCount(max_broken)
        self._reader = Reader(framing, seed, latents, empty_prompts)
        self.order = PairSampler(
            examples,
            framing,
            batch_size=batch_size * world_size,
            seed=seed if shuffle else None,
            buffer=shuffle_buffer,
            drop_last=drop_last,
            broken=self._broken,
        )
        super().__init__(examples, batch_sampler=self.order, collate_fn=list)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Example]]:  # type: ignore[override]
        epoch, start = self.epoch, self.batches
        self._broken.start_epoch()
        self.order.set_epoch(epoch)
        own = (slots[self.rows] for slots in islice(self.order, self.batches, None))
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

    @property
    def num_broken(self) -> int:
        """Number of different broken examples that this process found in this epoch."""
        return len(self._broken)

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

    def _settings(self) -> dict[str, Any]:
        order = self.order
        return {
            "seed": self._reader.seed,
            "shuffle": order.seed is not None,
            "shuffle_buffer": order.buffer if order.examples.count is None else None,
            "drop_last": order.drop_last,
            "global_batch_size": order.batch_size,
            "num_examples": order.examples.count,
            "weights": [weight for _, weight in order.examples.weights],
            "sizes": [list(size) for size in order.framing.sizes],
        }

    def _load_ahead(self, order: Iterator[list[Slot]], epoch: int) -> Iterator[list[Example]]:
        if self._threads == 0:
            yield from ([self._load(slot, epoch) for slot in slots] for slots in order)
            return
        planner, workers = ThreadPoolExecutor(1), ThreadPoolExecutor(self._threads)

        def start_batch() -> list[Future[Example]]:
            return [workers.submit(self._load, slot, epoch) for slot in next(order, [])]

        try:
            started = deque(planner.submit(start_batch) for _ in range(self._prefetch + 1))
            while batch := started.popleft().result():
                yield [row.result() for row in batch]
                started.append(planner.submit(start_batch))
        finally:
            planner.shutdown(cancel_futures=True)
            workers.shutdown(cancel_futures=True)

    def _load(self, slot: Slot, epoch: int) -> Example:
        """Loads a row, or the first of its replacements that is not broken."""
        block, order, _, size = slot
        for entry in slot.candidates():
            time, place = divmod(entry, block.size)
            example = block.read(place)
            try:
                return self._reader.load(example, number=block.start + place, epoch=epoch, size=size, time=time)
            except BrokenExample as error:
                self._broken.add(example.name, error, out_of=(block.start + block.size) / self.world_size)
        raise ValueError(f"none of {len(order)} examples of size {size} can be used; see the warnings before")


def _check_at_least(least: int, **settings: int) -> None:
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least} but got {value}")
