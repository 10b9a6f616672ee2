"""The deterministic batch sampler: which examples make which batch.

All draws of an epoch are hashes of (seed, epoch, example), so a batch depends neither on the batches before it nor on
the number of processes and threads:

- The order is a permutation of the data set, or of each block of a stream. An example of weight w comes w times in
  every resolution; where w is not a whole number, the examples take turns.
- Consecutive examples of one size fill a global batch, of which every process takes its share of the rows.
- A broken example is replaced by the example of the same size half an epoch (or block) away, then by the one after
  that. No other row moves.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, final

import torch
from torch.utils.data import Sampler

from .dataset import Block, Examples
from .image import BrokenExample, Framing, Size, image_size

logger = logging.getLogger(__name__)


def draw(*key: int | str) -> int:
    """Returns a number in [0, 2^63) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def draw_uniform(*key: int | str) -> float:
    """Returns a number in [0, 1) that depends on the key alone."""
    return (draw(*key) >> 10) / 2**53


@final
class Slot(NamedTuple):
    """The index of a row of a batch: a place in the order of the examples of its block and size.

    Attributes:
        block: Block of the example.
        order: The block's examples of this size in the order of the epoch, each as its place in the block plus the
            block's size times how often the example has come before.
        place: Place in `order`.
        size: Size (H, W) of the pixels.
    """

    block: Block
    order: Sequence[int]
    place: int
    size: Size

    def candidates(self) -> Iterator[int]:
        """Yields the entry of the example in `order`, then those of its replacements, each once."""
        middle = self.place + len(self.order) // 2
        others = ((middle + step) % len(self.order) for step in range(len(self.order)))
        return chain([self.order[self.place]], (self.order[other] for other in others if other != self.place))


@final
class BrokenCount:
    """Counts the different broken examples of an epoch, warns of each once, and raises when they are too many.

    Args:
        limit: Most broken examples: a number, or a share of the examples, which is rounded up.
    """

    def __init__(self, limit: int | float) -> None:
        if limit < 0 or (isinstance(limit, float) and limit > 1):
            raise ValueError(f"max_broken must be a share in [0.0, 1.0] or a number of examples but got {limit}")
        self.limit = limit
        self._names: set[str] = set()
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def start_epoch(self) -> None:
        """Sets the count to 0."""
        self._names = set()

    @contextmanager
    def skipping(self, name: str, *, out_of: float) -> Iterator[None]:
        """Catches a `BrokenExample` of the block and counts it; arguments and errors as in `add`."""
        try:
            yield
        except BrokenExample as error:
            self.add(name, error, out_of=out_of)

    def add(self, name: str, error: BrokenExample, *, out_of: float) -> None:
        """Counts a broken example.

        Args:
            name: Name of the example.
            error: The error that it raised.
            out_of: Number of examples that a share refers to.

        Raises:
            ValueError: There are more than the limit.
        """
        allowed = self.limit if isinstance(self.limit, int) else math.ceil(self.limit * out_of)
        with self._lock:
            self._names.add(name)
            if name not in self._named:
                self._named.add(name)
                logger.warning("%s is broken and skipped: %s", name, error)
            if len(self._names) > allowed:
                raise ValueError(
                    f"{len(self._names)} of about {math.ceil(out_of)} examples are broken, more than the {allowed} of "
                    f"max_broken={self.limit}; the last: {name}: {error}; mend the data, or raise max_broken"
                ) from error


@final
class PairSampler(Sampler[list[Slot]]):
    """Yields the global batches of the epoch that `set_epoch` sets.

    Args:
        examples: The examples.
        framing: Sizes of the images.
        batch_size: Rows of a global batch, all processes together.
        seed: Seed of the order; None for the stored order.
        buffer: Examples of a stream that are held in memory and permuted.
        drop_last: Whether to leave out the rows that do not fill a batch at the end of an epoch.
        broken: Counter of the images whose size cannot be read.

    Raises:
        ValueError: The examples do not fill a batch.
    """

    def __init__(
        self,
        examples: Examples,
        framing: Framing,
        *,
        batch_size: int,
        seed: int | None,
        buffer: int,
        drop_last: bool,
        broken: BrokenCount,
    ) -> None:
        self.examples, self.framing, self.batch_size = examples, framing, batch_size
        self.seed, self.buffer, self.drop_last, self._broken = seed, buffer, drop_last, broken
        self.epoch = 0
        self._sizes: Sequence[tuple[Size, ...]] | None = None
        if examples.count is not None:
            (block,) = examples.blocks(block_size=buffer)
            if framing.aspect_buckets:
                logger.info("reading the sizes of %d images from their headers", block.size)
            self._sizes = self._read_sizes(block)
        self.size_counts = self._count_sizes()
        self._announce()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose batches are yielded."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Slot]]:
        waiting: dict[Size, list[Slot]] = {}
        shards = None if self.seed is None else draw(self.seed, self.epoch, "shards")
        for block in self.examples.blocks(block_size=self.buffer, seed=shards):
            for slot in self._slots(block):
                waiting.setdefault(slot.size, []).append(slot)
                if len(waiting[slot.size]) == self.batch_size:
                    yield waiting.pop(slot.size)
        if not self.drop_last:
            yield from waiting.values()

    def __len__(self) -> int:
        """Returns the number of batches of a whole epoch.

        Raises:
            TypeError: The examples are a stream.
        """
        if self.size_counts is None:
            raise TypeError("the length of a stream shows at its end; set the number of training steps instead")
        rounded = math.floor if self.drop_last else math.ceil
        return sum(rounded(count / self.batch_size) for count in self.size_counts.values())

    def _slots(self, block: Block) -> list[Slot]:
        sizes = self._sizes if self._sizes is not None else self._read_sizes(block)
        entries = self._entries(block.size, sizes)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(draw(self.seed, self.epoch, block.start, "order"))
            entries = [entries[place] for place in torch.randperm(len(entries), generator=generator).tolist()]
        orders: dict[Size, list[int]] = {}
        slots = []
        for entry in entries:
            if found := sizes[entry % block.size]:
                size = found[entry // block.size % len(found)]
                order = orders.setdefault(size, [])
                slots.append(Slot(block, order, len(order), size))
                order.append(entry)
        return slots  # the orders are whole now

    def _entries(self, count: int, sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Returns the entries of an epoch (see `Slot.order`) by their place in a block of `count` examples."""
        weights = self.examples.weights or [(range(count), 1.0)]
        resolutions = 1 + len(self.framing.further_resolutions)
        if resolutions == 1 and all(weight == 1 for _, weight in weights):
            return list(range(count))
        entries = []
        for places, weight in weights:
            groups: dict[Any, list[int]] = {}  # so that every epoch has as many examples of a size
            for place in places:
                groups.setdefault(sizes[place], []).append(place)
            for group in groups.values():
                whole, rest = divmod(weight, 1)
                often = [(place, time) for place in group for time in range(int(whole))]
                often += [(place, int(whole)) for place in self._in_turn(group, rest)]
                entries += [
                    place + count * (time * resolutions + further)
                    for place, time in often
                    for further in range(resolutions)
                ]
        return sorted(entries, key=lambda entry: (entry % count, entry))

    def _in_turn(self, group: list[int], share: float) -> list[int]:
        """Returns the part of a group whose turn it is in this epoch, at least one if the share is not 0."""
        taken = max(1, round(share * len(group))) if share else 0
        if self.seed is not None:
            generator = torch.Generator().manual_seed(draw(self.seed, "turns"))
            group = [group[place] for place in torch.randperm(len(group), generator=generator).tolist()]
        return [group[(self.epoch * taken + step) % len(group)] for step in range(taken)]

    def _read_sizes(self, block: Block) -> Sequence[tuple[Size, ...]]:
        """Returns the sizes that each image of a block is resized to, none if its own cannot be read."""
        if not self.framing.aspect_buckets:
            return [self.framing.sizes_of((1, 1))] * block.size

        def read(place: int) -> tuple[Size, ...]:
            example = block.read(place)
            with self._broken.skipping(example.name, out_of=block.start + block.size):
                return self.framing.sizes_of(image_size(example.image))
            return ()

        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(read, range(block.size)))

    def _count_sizes(self) -> dict[Size, int] | None:
        if self._sizes is None:
            return None
        (block,) = self.examples.blocks(block_size=self.buffer)
        entries = self._entries(block.size, self._sizes)
        found = ((self._sizes[entry % block.size], entry // block.size) for entry in entries)
        counts = Counter(sizes[time % len(sizes)] for sizes, time in found if sizes)
        return {size: counts[size] for size in self.framing.sizes if counts[size]}

    def _announce(self) -> None:
        counts = self.size_counts
        if self.framing.aspect_buckets:
            table = _table(dict.fromkeys(self.framing.sizes, "?") if counts is None else counts)
            logger.info("aspect buckets, height x width: images: %s", table)
        if counts is None or not self.drop_last:
            return
        small = {size: count for size, count in counts.items() if count < self.batch_size}
        if len(small) == len(counts):
            raise ValueError(
                f"a batch of all processes holds {self.batch_size} images of one size, but there are only "
                f"{_table(counts) or 'broken ones'}; use a smaller batch, more images, or fewer aspect buckets"
            )
        if small:
            logger.warning(
                "%d images are never used, because their aspect bucket holds fewer than a batch of %d: %s; a larger "
                "multiple_of or a smaller max_aspect_ratio makes fewer buckets",
                *(sum(small.values()), self.batch_size, _table(small)),
            )


def _table(counts: dict[Size, int] | dict[Size, str]) -> str:
    return ", ".join(f"{height}x{width}: {count}" for (height, width), count in counts.items())
