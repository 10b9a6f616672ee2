"""Batches of images and captions for one process, loaded ahead by threads, resumable at any batch.

What is in a batch is decided by `plan` and `rows`, which draw from hashes and not from a random state; so the position
in the data is two numbers, the epoch and the batches taken from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor

from .cache import Entry, TensorCache
from .data import Examples
from .images import Framing, Size
from .plan import BatchPlan, BrokenCount, Slot
from .rows import Row, RowReader


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one size.

    Attributes:
        pixels: (b, 3, H, W) float32 in [-1, 1]; None if the latents come from a cache.
        latents: The cached tensors of the images, each (b, ...); None without a cache.
        captions: One per image, drawn among its captions.
        negative_captions: The hard negatives written for each image.
        image_ids: Equal for equal images, (b,) int64.
        size: (H, W) of the pixels.
        original_sizes: (h, w) of the upright images, (b, 2) int64.
        crop_top_lefts: Corner (top, left) of the crop in the resized images, (b, 2) int64.
        names: Of the examples, for messages.
    """

    pixels: Tensor | None
    latents: Entry | None
    captions: list[str]
    negative_captions: list[list[str]]
    image_ids: Tensor
    size: Size
    original_sizes: Tensor
    crop_top_lefts: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.captions)


@final
class PairLoader:
    """The batches of one process.

    Iterating yields what is left of the current epoch and ends with it; iterating again yields the next. One
    iterator at a time. A stream too short for one batch raises ValueError at its end.

    Process r gets rows r * batch_size to (r + 1) * batch_size of a global batch of batch_size * world_size rows, which
    is the same for any number of processes. Each reads the whole stream but decodes only its own rows.

    Args:
        examples: From `open_examples`.
        framing: Size and crop of the pixels.
        batch_size: Rows per process.
        seed: Of all draws.
        rank: Of this process.
        world_size: Number of processes.
        shuffle: Draws the order, else as stored.
        shuffle_buffer: Examples of a stream that are held in memory, as stored, and permuted.
        drop_last: Leaves out the rows that do not fill a batch at the end of an epoch: other ones in each, unless a
            bucket is smaller than a batch.
        max_broken: Different broken examples in an epoch that are replaced before an error: a number, or a share of
            the examples.
        num_workers: Threads that load ahead; 0 loads when asked. Pillow decodes and resizes without Python's lock.
        prefetch: Batches to load ahead.
        latents: Cache filled by `fill_latents`. Then no image is decoded, a random crop or flip is the same in every
            epoch, and images that are not in the cache count as broken.

    Raises:
        ValueError: A setting is out of range, or the examples do not fill a batch.
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
    ) -> None:
        _check_at_least(1, batch_size=batch_size, shuffle_buffer=shuffle_buffer, prefetch=prefetch)
        _check_at_least(0, num_workers=num_workers)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size - 1 but got rank {rank} of {world_size}")
        if world_size > 1 and not drop_last:
            raise ValueError("several processes need drop_last=True, or some would have no row of the last batch")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_workers, self.prefetch = num_workers, prefetch
        self.epoch, self.batches = 0, 0
        self._broken = BrokenCount(max_broken)
        self._reader = RowReader(framing, seed, latents)
        self._plan = BatchPlan(
            examples,
            framing,
            batch_size=batch_size * world_size,
            seed=seed if shuffle else None,
            buffer=shuffle_buffer,
            drop_last=drop_last,
            broken=self._broken,
        )

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.epoch, self.batches
        self._broken.start_epoch()
        for batch in self._load_ahead(islice(self._plan.batches(epoch), self.batches, None), epoch):
            self.batches += 1
            yield batch
        if start == self.batches == 0:
            raise ValueError(
                f"the stream ended before it filled a batch of {self._plan.batch_size}; use smaller batches"
            )
        self.epoch, self.batches = epoch + 1, 0

    def __len__(self) -> int:
        """Batches of a whole epoch.

        Raises:
            TypeError: The examples are a stream.
        """
        if self._plan.count is None:
            raise TypeError("the length of a stream shows at its end; set the number of training steps instead")
        return self._plan.count

    @property
    def size_counts(self) -> dict[Size, int] | None:
        """How many images are brought to each size (H, W); None of a stream."""
        return self._plan.size_counts

    @property
    def num_broken(self) -> int:
        """Different broken examples that this process met in this epoch."""
        return len(self._broken)

    def state_dict(self) -> dict[str, Any]:
        """The position, and the settings under which it is one."""
        return {"epoch": self.epoch, "batches": self.batches, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; skips what lies before it without decoding images (a stream is read up to there).

        Args:
            state: From `state_dict()`; with `epoch` and `batches` alone it is taken as it is.

        Raises:
            ValueError: It was saved under other settings, where the position is another.
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
        plan = self._plan
        return {
            "seed": self._reader.seed,
            "shuffle": plan.seed is not None,
            "shuffle_buffer": plan.buffer if plan.examples.count is None else None,
            "drop_last": plan.drop_last,
            "global_batch_size": plan.batch_size,
            "num_examples": plan.examples.count,
            "sizes": [list(size) for size in plan.framing.sizes],
        }

    def _load_ahead(self, plan: Iterator[list[Slot]], epoch: int) -> Iterator[Batch]:
        if self.num_workers == 0:
            for slots in map(self._own, plan):
                yield _collate([self._load(slot, epoch) for slot in slots], slots[0].size)
            return
        planner, workers = ThreadPoolExecutor(1), ThreadPoolExecutor(self.num_workers)

        def start_batch() -> tuple[list[Future[Row]], Size] | None:
            slots = self._own(next(plan, []))
            return ([workers.submit(self._load, slot, epoch) for slot in slots], slots[0].size) if slots else None

        try:
            started = deque(planner.submit(start_batch) for _ in range(self.prefetch + 1))
            while batch := started.popleft().result():
                rows, size = batch
                yield _collate([row.result() for row in rows], size)
                started.append(planner.submit(start_batch))
        finally:
            planner.shutdown(cancel_futures=True)
            workers.shutdown(cancel_futures=True)

    def _own(self, slots: list[Slot]) -> list[Slot]:
        """The rows of a global batch that are this process's."""
        return slots[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _load(self, slot: Slot, epoch: int) -> Row:
        """Loads a row, or the first of those that may replace it that is not broken."""
        out_of = (slot.block.start + slot.block.size) / self.world_size
        for place in slot.candidates():
            example, number = slot.block.read(place), slot.block.start + place
            with self._broken.skipping(example.name, out_of=out_of):
                return self._reader.read(example, number=number, epoch=epoch, size=slot.size)
        raise ValueError(
            f"none of {len(slot.order)} examples of size {slot.size} can be used; see the warnings before"
        )


def _collate(rows: list[Row], size: Size) -> Batch:
    pixels = [row.pixels for row in rows if row.pixels is not None]
    entries = [row.latents for row in rows if row.latents is not None]
    return Batch(
        pixels=torch.stack(pixels) if pixels else None,
        latents={key: torch.stack([entry[key] for entry in entries]) for key in entries[0]} if entries else None,
        captions=[row.caption for row in rows],
        negative_captions=[row.negative_captions for row in rows],
        image_ids=torch.tensor([row.image_id for row in rows]),
        size=size,
        original_sizes=torch.tensor([row.original_size for row in rows]),
        crop_top_lefts=torch.tensor([row.crop_top_left for row in rows]),
        names=[row.name for row in rows],
    )


def _check_at_least(least: int, **settings: int) -> None:
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least} but got {value}")
