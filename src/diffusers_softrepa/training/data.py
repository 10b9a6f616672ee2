"""Where images and captions come from: every kind of data set, read as numbered examples that are not decoded yet.

An example is one image with the captions that are true of it, and perhaps hard negatives: captions written for that
image that are not. The columns that hold them can be named, are found by their usual names otherwise:

- image: `image`, or the extension in webdataset shards (`jpg`, `png`, ...)
- captions: `text`, `caption`, `captions` or `txt`: a string or a list of strings, or several such columns; `a.b` for
  the entry `b` of a column `a` of JSON objects
- hard negatives: only the column that is named
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

import datasets

from .images import BrokenExample, image_size
from .sources import is_plain, load_rows, undecoded

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
_CAPTION_COLUMNS = ("text", "caption", "captions", "txt")


@final
@dataclass(frozen=True, eq=False)
class Example:
    """One image and its captions, as stored.

    Attributes:
        image: What `images.fetch` reads; the error if the data set itself could not read the example.
        captions: True of the image; stripped, without the empty ones.
        negative_captions: Written hard negatives, likewise.
        name: For messages: its number and its file if it has one.
    """

    image: Any
    captions: tuple[str, ...]
    negative_captions: tuple[str, ...]
    name: str


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A run of examples that can be read in any order.

    Attributes:
        start: Number of the first one in its epoch.
        size: How many.
        read: The example at a place in 0..size - 1.
    """

    start: int
    size: int
    read: Callable[[int], Example]


@final
@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what."""

    image: str
    captions: tuple[str, ...]
    negative_captions: str | None = None

    def stored(self, present: Iterable[str], *, images: bool = True) -> list[str]:
        """The columns of a data set that must be read."""
        texts = [*self.captions, *([self.negative_captions] if self.negative_captions else [])]
        wanted = [self.image, *texts] if images else texts
        return list(dict.fromkeys(name if name in present else name.split(".")[0] for name in wanted))

    def example(self, row: Any, number: int) -> Example:
        """Reads one row.

        Raises:
            ValueError: A column is missing from this row.
            TypeError: A caption is not a string.
        """
        image = _entry(_as_mapping(row), self.image, f"example {number}")
        path = image.get("path") if isinstance(image, Mapping) else image
        name = f"example {number}" + (f" ({path})" if isinstance(path, str | Path) else "")
        return Example(image, *self.texts(row, name), name)

    def texts(self, row: Any, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The captions and the hard negatives of one row; errors as `example`."""
        row, negatives = _as_mapping(row), self.negative_captions
        captions = tuple(text for column in self.captions for text in _texts(row, column, name))
        return captions, _texts(row, negatives, name) if negatives else ()


class Examples(ABC):
    """The numbered examples of a data set."""

    columns: Columns

    @property
    @abstractmethod
    def count(self) -> int | None:
        """How many, None if that shows only at the end of a stream."""

    @abstractmethod
    def blocks(self, *, block_size: int, seed: int | None = None) -> Iterator[Block]:
        """One epoch of examples: one block if they can be read in any order, else blocks in the order of the stream.

        Args:
            block_size: Of a stream's blocks, which are held in memory as stored.
            seed: Draws the order of a stream's shards; None keeps it.
        """

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """Every caption and hard negative once, in their order: for the text cache. Goes through the data set."""


@final
class StoredExamples(Examples):
    """Examples of anything with `len` and `[]`."""

    def __init__(self, rows: Any, columns: Columns) -> None:
        self.columns = columns
        self._rows = rows
        self._lock = threading.Lock()  # data sets need not bear to be read by several threads

    @property
    def count(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> Example:
        """One example."""
        try:
            with self._lock:
                row = self._rows[number]
        except OSError as error:
            return Example(error, (), (), f"example {number}")
        return self.columns.example(row, number)

    def blocks(self, *, block_size: int, seed: int | None = None) -> Iterator[Block]:
        yield Block(0, self.count, self.read)

    def captions(self) -> Iterator[str]:
        return _distinct_texts(self._rows, self.columns)


@final
class StreamedExamples(Examples):
    """Examples of a `datasets.IterableDataset`, in its order."""

    def __init__(self, rows: datasets.IterableDataset, columns: Columns) -> None:
        self.columns = columns
        self._rows = rows

    @property
    def count(self) -> None:
        return None

    def blocks(self, *, block_size: int, seed: int | None = None) -> Iterator[Block]:
        # A buffer of one leaves the order to us but draws the order of the shards.
        rows = iter(self._rows if seed is None else self._rows.shuffle(seed=seed % 2**32, buffer_size=1))
        start = 0
        while held := list(islice(rows, block_size)):
            yield self._block(start, held)
            start += len(held)

    def captions(self) -> Iterator[str]:
        return _distinct_texts(self._rows, self.columns)

    def _block(self, start: int, rows: list[Any]) -> Block:
        return Block(start, len(rows), lambda place: self.columns.example(rows[place], start + place))


def open_examples(
    data: Any,
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    negative_caption_column: str | None = None,
    split: str = "train",
    streaming: bool | None = None,
) -> Examples:
    """Opens a data set and checks it before anything long starts.

    Args:
        data: One of
            - a `datasets.Dataset` or `IterableDataset`
            - a folder with `metadata.jsonl`: a JSON object per line, `file_name` and the columns
            - webdataset shards: a path or URL ending in `.tar`, a pattern of such, a list of them, a folder of them
            - a folder written by `Dataset.save_to_disk`
            - whatever else `datasets.load_dataset` takes: a name on the Hub, a folder of parquet files
            - a list of dicts, or any other map-style data set of dicts or of pairs (image, captions)
        image_column: None for the usual names.
        caption_column: One or several; None for the usual names.
        negative_caption_column: None for no hard negatives.
        split: Of data sets that have several.
        streaming: Of shards and of `load_dataset`: reads as it goes instead of preparing a copy on the disk first.
            None streams shards and nothing else.

    Raises:
        ValueError: A column is missing, the data set is empty, or metadata.jsonl is not as it should be.
        TypeError: Captions are not strings, images not images, or `data` is none of these.
    """
    rows = undecoded(load_rows(data, split, streaming))
    first = _first_row(rows)
    columns = _find_columns(first, image_column, caption_column, negative_caption_column)
    if isinstance(rows, list):  # in memory already: all of it is checked
        for number, row in enumerate(rows):
            columns.example(row, number)
    example = columns.example(first, 0)
    with suppress(BrokenExample):  # skipped and counted when it is its turn
        image_size(example.image)
    if is_plain(rows):
        rows = rows.select_columns(columns.stored(_as_mapping(first)))
    streamed = isinstance(rows, datasets.IterableDataset)
    return StreamedExamples(rows, columns) if streamed else StoredExamples(rows, columns)


def _first_row(rows: Any) -> Any:
    if isinstance(rows, datasets.IterableDataset):
        for row in rows:
            return row
    elif len(rows):
        return rows[0]
    raise ValueError("the training data is empty; give at least as many images as a batch holds")


def _distinct_texts(rows: Any, columns: Columns) -> Iterator[str]:
    if is_plain(rows):
        rows = rows.select_columns(columns.stored(rows.column_names or (), images=False))  # images stay unread
    texts: dict[str, None] = {}
    for number, row in enumerate(rows if isinstance(rows, Iterable) else map(rows.__getitem__, range(len(rows)))):
        for kind in columns.texts(row, f"example {number}"):
            texts.update(dict.fromkeys(kind))
    return iter(texts)


def _find_columns(row: Any, image: str | None, captions: str | Sequence[str] | None, negatives: str | None) -> Columns:
    present = _present(_as_mapping(row))
    found_image = _choose("image", present, [image] if image else None, _IMAGE_COLUMNS)[0]
    given = [captions] if isinstance(captions, str) else captions
    found = _choose("caption", present, given, _CAPTION_COLUMNS)
    if negatives:
        _choose("negative_caption", present, [negatives], ())
    return Columns(found_image, tuple(found), negatives)


def _choose(kind: str, present: list[str], given: Sequence[str] | None, usual: Iterable[str]) -> list[str]:
    chosen = list(given) if given else [name for name in usual if name in present]
    absent = [name for name in chosen if name not in present]
    if absent or not chosen:
        wanted = f"has no column {', '.join(map(repr, absent))}" if absent else f"has no {kind} column of a usual name"
        raise ValueError(f"the data set {wanted}; its columns are {present}: choose with {kind}_column=...")
    if not given and len(chosen) > 1:
        raise ValueError(f"the data set has several {kind} columns, {chosen}: choose with {kind}_column=...")
    return chosen


def _present(row: Mapping[str, Any]) -> list[str]:
    """Columns, and the entries of those that hold JSON objects."""
    inner = [f"{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value]
    return [*row, *inner]


def _as_mapping(row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, tuple | list) and len(row) == 2:
        return {"image": row[0], "captions": row[1]}
    raise TypeError(f"examples must be dicts of columns or pairs (image, captions) but got {type(row).__name__}")


def _entry(row: Mapping[str, Any], column: str, name: str) -> Any:
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    if inner and outer in row:
        return (row[outer] or {}).get(inner)
    raise ValueError(f"{name} has no column {column!r}, only {list(row)}")


def _texts(row: Mapping[str, Any], column: str, name: str) -> tuple[str, ...]:
    value = _entry(row, column, name)
    texts = [value] if isinstance(value, str) or value is None else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str | None) for text in texts):
        raise TypeError(
            f"captions must be strings or lists of strings, but column {column!r} of {name} holds {value!r:.80}; "
            "choose another column, or one entry of it as 'column.entry'"
        )
    return tuple(text.strip() for text in texts if text and text.strip())
