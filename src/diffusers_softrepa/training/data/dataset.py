"""Where images and captions come from: every kind of data set, read as numbered examples that are not decoded yet.

An example is one image with the captions that are true of it, and perhaps hard negatives: captions written for that
image that are not. The columns that hold them can be named, are found by their usual names otherwise:

- image: `image`, or the extension in webdataset shards (`jpg`, `png`, ...)
- captions: `text`, `caption`, `captions` or `txt`: a string or a list of strings, or several such columns; `a.b` for
  the entry `b` of a column `a` of JSON objects
- hard negatives: only the column that is named
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, final

import datasets
from torch import Tensor

from .image import BrokenExample, Size, content_id, fetch, image_size

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
_CAPTION_COLUMNS = ("text", "caption", "captions", "txt")
_FINGERPRINTED = 64  # examples


@final
@dataclass(frozen=True, eq=False)
class Example:
    """One image and its captions: as stored, and from `loader.Reader` on with what a batch takes of it.

    Attributes:
        image: What `image.fetch` reads; the error if the data set itself could not read it; None once it is decoded.
        captions: True of the image; stripped, without the empty ones.
        negative_captions: Written hard negatives, likewise.
        name: For messages: its number and its file if it has one.
        caption: The one that was drawn among `captions`.
        pixels: (3, H, W) float32 in [-1, 1]; None before it is decoded, and where the latents come from a cache.
        latents: The cached tensors of the image; None without a cache.
        image_id: Equal for equal images, in [0, 2^63).
        size: (H, W) of the pixels.
    """

    image: Any
    captions: tuple[str, ...]
    negative_captions: tuple[str, ...]
    name: str
    caption: str = ""
    pixels: Tensor | None = None
    latents: dict[str, Tensor] | None = None
    image_id: int = 0
    size: Size = (0, 0)


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
        row, name = row if isinstance(row, dict) else _as_mapping(row), f"example {number}"
        image = row[self.image] if self.image in row else _entry(row, self.image, name)
        path = image.get("path") if isinstance(image, Mapping) else image
        if isinstance(path, str | Path):
            name = f"{name} ({path})"
        return Example(image, *self.texts(row, name), name)

    def texts(self, row: Any, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The captions and the hard negatives of one row; errors as `example`."""
        if not isinstance(row, Mapping):
            row = _as_mapping(row)
        captions: list[str] = []
        negatives: list[str] = []
        for found, columns in ((captions, self.captions), (negatives, [self.negative_captions or ""])):
            for column in filter(None, columns):
                value = row[column] if column in row else _entry(row, column, name)
                texts = [value] if isinstance(value, str) or value is None else value
                if not isinstance(texts, list | tuple) or not all(isinstance(text, str | None) for text in texts):
                    raise TypeError(
                        f"captions must be strings or lists of strings, but column {column!r} of {name} holds "
                        f"{value!r:.80}; choose another column, or one entry of it as 'column.entry'"
                    )
                found += [text.strip() for text in texts if text and text.strip()]
        return tuple(captions), tuple(negatives)


@final
class Examples:
    """The numbered examples of a data set.

    Args:
        rows: Anything with `len` and `[]`, or a `datasets.IterableDataset`, whose order is kept.
        columns: Which columns hold what.
        source: The path or name that they were opened by, if it was one.
    """

    def __init__(self, rows: Any, columns: Columns, *, source: str | None = None) -> None:
        self.columns, self.source = columns, source
        self._rows, self._streamed = rows, isinstance(rows, datasets.IterableDataset)
        self._lock = threading.Lock()  # data sets need not bear to be read by several threads

    @property
    def count(self) -> int | None:
        """How many, None if that shows only at the end of a stream."""
        return None if self._streamed else len(self._rows)

    def blocks(self, *, block_size: int, seed: int | None = None) -> Iterator[Block]:
        """One epoch of examples: one block if they can be read in any order, else blocks in the order of the stream.

        Args:
            block_size: Of a stream's blocks, which are held in memory as stored.
            seed: Draws the order of a stream's shards; None keeps it.
        """
        if not self._streamed:
            yield Block(0, len(self._rows), self._read)
            return
        # A buffer of one leaves the order to us but draws the order of the shards.
        rows = iter(self._rows if seed is None else self._rows.shuffle(seed=seed % 2**32, buffer_size=1))
        start = 0
        while held := list(islice(rows, block_size)):
            yield self._block(start, held)
            start += len(held)

    def fingerprint(self) -> str:
        """A short text that is the same for the same data: of their number, and of a few examples spread over them.

        An image counts by its content, not by where it lies.
        """
        block = next(self.blocks(block_size=_FINGERPRINTED), Block(0, 0, self._read))
        digest = hashlib.sha256(repr((self.count, self.columns)).encode())
        for place in range(0, block.size, max(1, block.size // _FINGERPRINTED)):
            example = block.read(place)
            with suppress(BrokenExample):
                digest.update(str(content_id(fetch(example.image))).encode())
            digest.update(repr((example.captions, example.negative_captions)).encode())
        return digest.hexdigest()[:16]

    def has_negatives(self, count: int) -> bool:
        """Whether there are more than `count` different captions, or written negatives; reads no more than it must."""
        texts: set[str] = set()
        for captions, negatives in self._texts():
            texts.update(captions)
            if negatives or len(texts) > count:
                return True
        return False

    def captions(self) -> Iterator[str]:
        """Every caption and hard negative once, in their order: for the text cache. Goes through the data set."""
        return iter(dict.fromkeys(text for kinds in self._texts() for kind in kinds for text in kind))

    def _texts(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The captions and the hard negatives of each row."""
        rows: Any = self._rows
        if is_plain(rows):
            stored = self.columns.stored(rows.column_names or (), images=False)  # images stay unread
            rows = rows.select_columns(stored)
        for number, row in enumerate(rows if isinstance(rows, Iterable) else map(rows.__getitem__, range(len(rows)))):
            yield self.columns.texts(row, f"example {number}")

    def _read(self, number: int) -> Example:
        try:
            with self._lock:
                row = self._rows[number]
        except OSError as error:
            return Example(error, (), (), f"example {number}")
        return self.columns.example(row, number)

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
        data: Opened `Examples`, which are returned as they are, or one of
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
    if isinstance(data, Examples):
        return data
    rows = _undecoded(load_rows(data, split, streaming))
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
    return Examples(rows, columns, source=data if isinstance(data, str) else None)


# Rows.


def load_rows(data: Any, split: str, streaming: bool | None) -> Any:
    """What was given, as a list of dicts, a map-style data set or an `IterableDataset`; see `open_examples`.

    Raises:
        ValueError: The folder is empty, there is no shard, or metadata.jsonl is not as it should be.
        TypeError: It is something else.
    """
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"give one split of the data set, such as data[{next(iter(data))!r}]; it has {list(data)}")
    if isinstance(data, str | Path):
        return _load_from(str(data), split, streaming)
    if isinstance(data, list | tuple) and data and all(_is_shard(entry) for entry in data):
        return _load_shards([str(entry) for entry in data], streaming)
    if isinstance(data, datasets.IterableDataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data
    raise TypeError(
        "training data must be a data set, a path, a name, or a list of dicts (see open_examples), but got "
        f"{type(data).__name__}; make one of a generator with datasets.IterableDataset.from_generator"
    )


def _load_from(source: str, split: str, streaming: bool | None) -> Any:
    folder = Path(source)
    if (folder / "metadata.jsonl").is_file():
        return _load_folder(folder)
    if source.endswith(".tar"):
        return _load_shards(source if "://" in source else sorted(glob(source)), streaming, source)
    if folder.is_dir():
        if shards := sorted(str(path) for path in folder.glob("*.tar")):
            return _load_shards(shards, streaming)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if not any(folder.iterdir()):
            raise ValueError(f"{source} is empty; put images and a metadata.jsonl there")
    return datasets.load_dataset(source, split=split, streaming=bool(streaming))


def _is_shard(source: Any) -> bool:
    return isinstance(source, str | Path) and str(source).endswith(".tar")


def _load_shards(shards: str | list[str], streaming: bool | None, given: str = "") -> Any:
    if not shards:
        raise ValueError(f"no webdataset shard is at {given}")
    return datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=streaming is not False)


def _load_folder(folder: Path) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl, each with the path of its image."""
    rows, missing = [], []
    for number, line in enumerate((folder / "metadata.jsonl").read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {folder}/metadata.jsonl is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(
                f"every line of {folder}/metadata.jsonl must be a JSON object with a file_name, "
                f'such as {{"file_name": "cat.jpg", "text": "a cat"}}, but line {number} is {line:.80}'
            )
        path = folder / row["file_name"]
        missing += [] if path.is_file() else [f"{row['file_name']} (line {number})"]
        rows.append({**row, "image": path})
    if missing:
        raise ValueError(
            f"{folder}/metadata.jsonl names {len(missing)} of {len(rows)} files that do not exist: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return rows


def is_plain(rows: Any) -> bool:
    """Whether its columns are stored ones, not made by the user's `set_transform`."""
    if isinstance(rows, datasets.Dataset):
        return rows.format["type"] != "custom"
    return isinstance(rows, datasets.IterableDataset)


def _undecoded(rows: Any) -> Any:
    """Leaves decoding to us, where a broken image can be told from a broken data set."""
    if not is_plain(rows):
        return rows
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows.with_format(None)


def _first_row(rows: Any) -> Any:
    if isinstance(rows, datasets.IterableDataset):
        for row in rows:
            return row
    elif len(rows):
        return rows[0]
    raise ValueError("the training data is empty; give at least as many images as a batch holds")


# Columns.


def _find_columns(row: Any, image: str | None, captions: str | Sequence[str] | None, negatives: str | None) -> Columns:
    row = _as_mapping(row)
    inner = (f"{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value)
    present = [*row, *inner]  # columns, and the entries of those that hold JSON objects
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
