"""The deterministic batch sampler: which examples make which batch.

All draws of an epoch are hashes of (seed, epoch, example), so a batch depends neither on the batches before it nor on
the number of processes and threads:

- The order is a permutation of the data set, or of each block of a stream. An example of weight w comes w times in
  every resolution; where w is not a whole number, the examples take turns.
- Consecutive examples of one size fill a global batch, of which every process takes its share of the rows. Rows that
  do not fill a batch at the end of an epoch are left out.
- A broken example is replaced by the example of the same size half an epoch (or block) away, then by the one after
  that. No other row moves.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, final

import torch

from .dataset import Block, Example, Examples
from .image import BrokenExample, Framing, Size, image_size

logger = logging.getLogger(__name__)

Entry = tuple[int, int]  # the place of an example in its block, and how often it has come before in the epoch


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
        order: The block's examples of this size in the order of the epoch, each as its place in the block and how
            often it has come before.
        place: Place in `order`.
        size: Size (H, W) of the pixels.
    """

    block: Block
    order: Sequence[Entry]
    place: int
    size: Size

    def candidates(self) -> Iterator[Entry]:
        """Returns the entry of the example in `order`, then those of its replacements, each once."""
        middle = self.place + len(self.order) // 2
        others = ((middle + step) % len(self.order) for step in range(len(self.order)))
        return chain([self.order[self.place]], (self.order[other] for other in others if other != self.place))


@final
class BrokenCount:
    """Counts the different broken examples of an epoch, warns of each once, and raises when they are too many.

    Attributes:
        limit: Most broken examples: a number, or a share of the examples, which is rounded up.
        names: Names of those that were counted; cleared at the beginning of an epoch.

    Raises:
        ValueError: The limit is negative, or a share above 1.
    """

    def __init__(self, limit: int | float) -> None:
        if limit < 0 or (isinstance(limit, float) and limit > 1):
            raise ValueError(f"max_broken must be a share in [0.0, 1.0] or a number of examples but got {limit}")
        self.limit = limit
        self.names: set[str] = set()
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def add(self, example: Example, error: BrokenExample, *, out_of: float) -> None:
        """Counts an example that raised an error, out of the number of examples that a share refers to.

        Raises:
            ValueError: There are more than the limit.
        """
        name, allowed = example.name, self.limit if isinstance(self.limit, int) else math.ceil(self.limit * out_of)
        with self._lock:
            self.names.add(name)
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s is broken and skipped: %s", name, error)
            if len(self.names) > allowed:
                raise ValueError(
                    f"{len(self.names)} of about {math.ceil(out_of)} examples are broken, more than the {allowed} of "
                    f"max_broken={self.limit}; the last: {name}: {error}; mend the data, or raise max_broken"
                ) from error


@final
@dataclass(eq=False)
class PairSampler:
    """The global batches of each epoch.

    Attributes:
        examples: The examples.
        framing: Sizes of the images.
        batch_size: Rows of a global batch, all processes together.
        seed: Seed of the order; None for the stored order.
        buffer: Examples of a stream that are held in memory and permuted.
        broken: Counter of the images whose size cannot be read.
        size_counts: Number of rows of each size in an epoch; None for a stream.

    Raises:
        ValueError: The examples do not fill a batch.
    """

    examples: Examples
    framing: Framing
    batch_size: int
    seed: int | None
    buffer: int
    broken: BrokenCount
    size_counts: dict[Size, int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._sizes: Sequence[tuple[Size, ...]] = ()  # of each example, if their number is known
        if self.examples.count is not None:
            if self.framing.aspect_buckets:
                logger.info("reading the sizes of %d images from their headers", len(self.examples))
            sizes = self._sizes = self._read_sizes(Block(0, self.examples))
            entries = self._entries(sizes, epoch=0)  # those of every epoch have as many of each size
            counts = Counter(sizes[place][time % len(sizes[place])] for place, time in entries if sizes[place])
            self.size_counts = {size: counts[size] for size in self.framing.sizes if counts[size]}
            self._check_counts(self.size_counts)
        if self.framing.aspect_buckets:
            shown = dict.fromkeys(self.framing.sizes, "?") if self.size_counts is None else self.size_counts
            logger.info("aspect buckets, height x width: images: %s", _table(shown))

    def __len__(self) -> int:
        """Returns the number of batches of a whole epoch.

        Raises:
            TypeError: The examples are a stream.
        """
        if self.size_counts is None:
            raise TypeError("the length of a stream shows at its end; set the number of training steps instead")
        return sum(count // self.batch_size for count in self.size_counts.values())

    def batches(self, epoch: int) -> Iterator[list[Slot]]:
        """Yields the batches of an epoch."""
        waiting: dict[Size, list[Slot]] = {}
        shards = None if self.seed is None else draw(self.seed, epoch, "shards")
        for block in self.examples.blocks(block_size=self.buffer, seed=shards):
            for slot in self._slots(block, epoch):
                waiting.setdefault(slot.size, []).append(slot)
                if len(waiting[slot.size]) == self.batch_size:
                    yield waiting.pop(slot.size)

    def _slots(self, block: Block, epoch: int) -> list[Slot]:
        sizes, slots = self._sizes or self._read_sizes(block), []
        orders: dict[Size, list[Entry]] = {}
        for place, time in self._permuted(self._entries(sizes, epoch), epoch, block.start, "order"):
            if found := sizes[place]:
                size = found[time % len(found)]
                order = orders.setdefault(size, [])
                slots.append(Slot(block, order, len(order), size))
                order.append((place, time))
        return slots  # the orders are whole now

    def _entries(self, sizes: Sequence[Any], epoch: int) -> list[Entry]:
        """Returns the entries of an epoch by their place in a block whose images have these sizes."""
        entries = []
        for places, weight in self.examples.weights or [(range(len(sizes)), 1.0)]:
            further = self._in_turn(places, weight % 1, sizes, epoch)
            often, resolutions = int(weight), len(self.framing.resolutions)
            entries += [(p, time) for p in places for time in range(resolutions * (often + (p in further)))]
        return entries

    def _in_turn(self, places: Iterable[int], share: float, sizes: Sequence[Any], epoch: int) -> set[int]:
        """Returns the places whose turn it is in this epoch: a share of those of each size, at least one."""
        groups: dict[Any, list[int]] = {}  # so that every epoch has as many examples of a size
        for place in places if share else ():
            groups.setdefault(sizes[place], []).append(place)
        found: set[int] = set()
        for group in groups.values():
            taken, group = max(1, round(share * len(group))), self._permuted(group, "turns")
            found.update(group[(epoch * taken + step) % len(group)] for step in range(taken))
        return found

    def _permuted(self, items: list[Any], *key: int | str) -> list[Any]:
        if self.seed is None:
            return items
        generator = torch.Generator().manual_seed(draw(self.seed, *key))
        return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]

    def _read_sizes(self, block: Block) -> Sequence[tuple[Size, ...]]:
        """Returns the sizes that each image of a block is resized to, none if its own cannot be read."""
        count = len(block.examples)
        if not self.framing.aspect_buckets:
            return [self.framing.sizes_of((1, 1))] * count

        def read(place: int) -> tuple[Size, ...]:
            example = block.examples[place]
            try:
                return self.framing.sizes_of(image_size(example.image))
            except BrokenExample as error:
                self.broken.add(example, error, out_of=block.start + count)
                return ()

        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(read, range(count)))

    def _check_counts(self, counts: dict[Size, int]) -> None:
        small = {size: count for size, count in counts.items() if count < self.batch_size}
        if len(small) == len(counts):
            raise ValueError(
                f"a batch of all processes holds {self.batch_size} images of one size, but there are only "
                f"{_table(counts) or 'broken ones'}; use a smaller batch, more images, or fewer aspect buckets"
            )
        if small:
            logger.warning(
                "%d images are never used, because their aspect bucket holds fewer than a batch of %d: %s; a smaller "
                "batch uses more of them",
                *(sum(small.values()), self.batch_size, _table(small)),
            )


def _table(counts: Mapping[Size, int | str]) -> str:
    return ", ".join(f"{height}x{width}: {count}" for (height, width), count in counts.items())
