"""Which examples make which batch of which process: a law, not a process.

Everything drawn in an epoch comes from a hash of (seed, epoch, example) and from nothing else, so a batch depends
neither on the batches before it nor on the number of processes and threads:

- the order is a permutation of the data set, or of one block of a stream after the other
- consecutive examples of one size fill a global batch; every process takes its share of the rows
- a broken example is replaced by the one half an epoch (or block) away of the same size, then by the one after that;
  no other row moves
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
from typing import NamedTuple, final

import torch
from torch.utils.data import Sampler

from .dataset import Block, Examples
from .image import BrokenExample, Framing, Size, image_size

logger = logging.getLogger(__name__)


def draw(*key: int | str) -> int:
    """A number in [0, 2^63) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def draw_uniform(*key: int | str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return (draw(*key) >> 10) / 2**53


@final
class Slot(NamedTuple):
    """The index of a row of a batch: a place in the order of the examples of its block and size.

    Attributes:
        block: Of the example.
        order: The block's examples of this size, in the order of the epoch.
        place: In `order`.
        size: Of the pixels, (H, W).
    """

    block: Block
    order: Sequence[int]
    place: int
    size: Size

    def candidates(self) -> Iterator[int]:
        """Places in the block: of the example, then of those that may replace it, each once."""
        middle = self.place + len(self.order) // 2
        others = ((middle + step) % len(self.order) for step in range(len(self.order)))
        return chain([self.order[self.place]], (self.order[other] for other in others if other != self.place))


@final
class BrokenCount:
    """Counts the different broken examples of an epoch, names each once, and ends it when they are too many.

    Args:
        limit: A number, or a share of the examples, rounded up.
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
        """Counts from zero."""
        self._names = set()

    @contextmanager
    def skipping(self, name: str, *, out_of: float) -> Iterator[None]:
        """Ends the block at a `BrokenExample`, and counts it; arguments and errors as `add`."""
        try:
            yield
        except BrokenExample as error:
            self.add(name, error, out_of=out_of)

    def add(self, name: str, error: BrokenExample, *, out_of: float) -> None:
        """Counts a broken example.

        Args:
            name: Of the example.
            error: What is wrong with it.
            out_of: Examples that a share refers to.

        Raises:
            ValueError: They are more than the limit.
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
    """The global batches of an epoch; iterating yields those of `epoch`, which `set_epoch` sets.

    Args:
        examples: What is ordered.
        framing: Which size each image is brought to.
        batch_size: Rows of a global batch, all processes together.
        seed: Of the order; None for the stored one.
        buffer: Examples of a stream that are held in memory and permuted.
        drop_last: Leaves out the rows that do not fill a batch at the end of an epoch.
        broken: Counts the images whose size cannot be read.

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
        self._sizes = self._read_sizes() if framing.aspect_buckets and examples.count is not None else None
        self.size_counts = self._count_sizes()
        self._announce()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches are yielded from now on."""
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
        """Batches of a whole epoch.

        Raises:
            TypeError: The examples are a stream.
        """
        if self.size_counts is None:
            raise TypeError("the length of a stream shows at its end; set the number of training steps instead")
        rounded = math.floor if self.drop_last else math.ceil
        return sum(rounded(count / self.batch_size) for count in self.size_counts.values())

    def _slots(self, block: Block) -> list[Slot]:
        orders: dict[Size, list[int]] = {}
        slots = []
        for place in self._order(block):
            if (size := self._size(block, place)) is not None:
                order = orders.setdefault(size, [])
                slots.append(Slot(block, order, len(order), size))
                order.append(place)
        return slots  # the orders are whole now

    def _order(self, block: Block) -> list[int]:
        if self.seed is None:
            return list(range(block.size))
        generator = torch.Generator().manual_seed(draw(self.seed, self.epoch, block.start, "order"))
        return torch.randperm(block.size, generator=generator).tolist()

    def _size(self, block: Block, place: int) -> Size | None:
        """The size that an image is brought to; None if its own cannot be read."""
        if not self.framing.aspect_buckets:
            return self.framing.sizes[0]
        return self._sizes[place] if self._sizes is not None else self._read_size(block, place)

    def _read_size(self, block: Block, place: int) -> Size | None:
        example = block.read(place)
        with self._broken.skipping(example.name, out_of=block.start + block.size):
            return self.framing.size_of(image_size(example.image))
        return None

    def _read_sizes(self) -> list[Size | None]:
        (block,) = self.examples.blocks(block_size=self.buffer)
        logger.info("reading the sizes of %d images from their headers", block.size)
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(lambda place: self._read_size(block, place), range(block.size)))

    def _count_sizes(self) -> dict[Size, int] | None:
        if self.examples.count is None:
            return None
        if self._sizes is None:
            return {self.framing.sizes[0]: self.examples.count}
        counts = Counter(self._sizes)
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
