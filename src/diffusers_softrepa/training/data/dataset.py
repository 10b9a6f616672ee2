"""Data sets of images and captions, of every kind, read as numbered examples that are not decoded yet.

An example is one image with captions that are true of it, and possibly written negatives: captions that are wrong for
it. The columns that hold them can be named, and are found by their usual names otherwise:

- image: `image`, or the extension in webdataset shards (`jpg`, `png`, ...)
- captions: `text`, `caption`, `captions`, `txt`, `prompt`, `description`, ...: a string or a list of strings, or
  several such columns; `a.b` for the entry `b` of a column `a` of JSON objects
- written negatives: only the column that is named

Captions that are empty, or hold half of a character (a lone surrogate), are left out; longer ones than text encoders
read are cut.
"""

from __future__ import annotations

import hashlib
import math
import re
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import glob
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple, final

import datasets
from torch import Tensor

from ...files import parse_json
from ...quoting import has_surrogate, one_line, quoted
from .folders import IMAGE_SUFFIXES, TABLE_SUFFIXES, load_folder, load_table
from .image import BrokenExample, Size, content_id, fetch, image_size

# In characters. Text encoders read some 1,000 tokens at most, but their tokenizers go through all of a text each time.
LONGEST_CAPTION = 16_384

_IMAGE_COLUMNS = "image jpg jpeg png webp img"
_CAPTION_COLUMNS = "text caption captions txt prompt prompts description caption_text sentence"
_FINGERPRINTED = 64  # examples
_MOST_REPEATS = 1000  # of an example in an epoch


@final
@dataclass(frozen=True, eq=False)
class Example:
    """One image and its captions; the fields from `caption` on are set by `loader.PairLoader`.

    Attributes:
        number: Its number in the data set, or in the epoch of a stream.
        image: Anything that `image.fetch` reads, or the error of the data set; None once it is decoded.
        captions: Captions that are true of the image, without empty ones.
        negative_captions: Written negatives, without empty ones.
        name: Its number, and its file if it has one, for messages.
        caption: The caption that was drawn from `captions`.
        pixels: Pixels (3, H, W) float32 in [-1, 1]; None before it is decoded or with cached latents.
        latents: The cached tensors of the image; None without a cache.
        image_id: A number in [0, 2^63) that is equal for equal images.
        size: Size (H, W) of the pixels.
    """

    number: int
    image: Any
    captions: tuple[str, ...]
    negative_captions: tuple[str, ...]
    name: str
    caption: str = ""
    pixels: Tensor | None = None
    latents: dict[str, Tensor] | None = None
    image_id: int = 0
    size: Size = (0, 0)


def meanings(captions: Iterable[str]) -> list[str]:
    """Returns texts that are equal for captions that differ in case and blanks alone, which many tokenizers drop."""
    return [" ".join(caption.casefold().split()) for caption in captions]


@final
class Block(NamedTuple):
    """Consecutive examples that can be read in any order, and the number of the first one in its epoch."""

    start: int
    examples: Examples | list[Example]


@final
@dataclass(frozen=True)
class Columns:
    """The columns that hold images (None to leave them unread), captions and written negatives."""

    image: str | None
    captions: tuple[str, ...]
    negative_captions: str | None = None

    def stored(self, present: Iterable[str]) -> list[str]:
        """Returns the columns of a data set that must be read."""
        wanted = [self.image, *self.captions, self.negative_captions]
        return list(dict.fromkeys(name if name in present else name.split(".")[0] for name in wanted if name))

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
            name = f"{name} ({one_line(path)})"
        captions: list[str] = []
        negatives: list[str] = []
        for found, columns in ((captions, self.captions), (negatives, [self.negative_captions or ""])):
            for column in filter(None, columns):
                value = row[column] if column in row else _entry(row, column, name)
                if isinstance(value, float) and math.isnan(value):  # as tables have it for no text
                    value = None
                texts = [value] if value is None or isinstance(value, str) else value
                if not isinstance(texts, list | tuple) or not all(isinstance(text, str | None) for text in texts):
                    raise TypeError(
                        f"captions must be strings or lists of strings, but column {column!r} of {name} holds "
                        f"{value!r:.80}; choose another column, or one entry of it as 'column.entry'"
                    )
                texts = [text.strip()[:LONGEST_CAPTION] for text in texts if text and not has_surrogate(text)]
                found += filter(None, texts)
        return Example(number, image, tuple(captions), tuple(negatives), name)


@final
class Part(NamedTuple):
    """One of the data sets that examples come from.

    Attributes:
        rows: Anything with `len` and `[]`, or a `datasets.IterableDataset`.
        columns: The columns to read.
        weight: How often an epoch has each example; with 2.5, a changing half of them three times.
    """

    rows: Any
    columns: Columns
    weight: float


@final
class Examples:
    """The numbered examples of one or several data sets; those of known length are read with `examples[number]`.

    Args:
        parts: The data sets; a stream must be the only one.
        source: The path or name that they were opened by; defaults to None.
    """

    def __init__(self, parts: Sequence[Part], *, source: str | None = None) -> None:
        self.source, self._parts = source, list(parts)
        self._streamed = isinstance(parts[0].rows, datasets.IterableDataset)
        self._ends = [0] if self._streamed else list(accumulate(len(part.rows) for part in parts))
        self._lock = threading.Lock()  # data sets need not bear to be read by several threads

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Example:
        place = bisect_right(self._ends, number)
        part = self._parts[place]
        try:
            with self._lock:
                row = part.rows[number - self._ends[place] + len(part.rows)]
        except OSError as error:
            return Example(number, error, (), (), f"example {number}")
        return part.columns.example(row, number)

    @property
    def count(self) -> int | None:
        """Number of different examples; None for a stream."""
        return None if self._streamed else len(self)

    @property
    def weights(self) -> list[tuple[range, float]]:
        """How often the examples of each range come in an epoch; empty for a stream, whose examples come once."""
        parts = [] if self._streamed else zip(self._parts, self._ends, strict=True)
        return [(range(end - len(part.rows), end), part.weight) for part, end in parts]

    def blocks(self, *, block_size: int, seed: int | None = None) -> Iterator[Block]:
        """Yields the examples of one epoch, in one block, or in several for a stream.

        Args:
            block_size: Number of examples of a stream that are held in memory, not decoded.
            seed: Seed of the order of a stream's shards; defaults to None, which keeps it.
        """
        if not self._streamed:
            yield Block(0, self)
            return
        # A buffer of one leaves the order to us but draws the order of the shards.
        rows, columns = self._parts[0].rows, self._parts[0].columns
        rows = enumerate(rows if seed is None else rows.shuffle(seed=seed % 2**32, buffer_size=1))
        while held := [columns.example(row, number) for number, row in islice(rows, block_size)]:
            yield Block(held[0].number, held)

    def fingerprint(self) -> str:
        """Returns a hash of the number of examples, and of the content of a few of them, wherever the files lie."""
        digest = hashlib.sha256(repr((self.count, [(part.columns, part.weight) for part in self._parts])).encode())
        for _, examples in islice(self.blocks(block_size=_FINGERPRINTED), 1):
            for place in range(0, len(examples), max(1, len(examples) // _FINGERPRINTED)):
                example = examples[place]
                with suppress(BrokenExample):
                    digest.update(str(content_id(fetch(example.image))).encode())
                digest.update(repr((example.captions, example.negative_captions)).encode())
        return digest.hexdigest()[:16]

    def has_negatives(self, count: int) -> bool:
        """Returns whether there are more than `count` captions of different meaning, or written negatives."""
        texts: set[str] = set()
        for example in self._without_images():
            texts.update(meanings(example.captions))
            if example.negative_captions or len(texts) > count:
                return True
        return False

    def without_caption(self) -> list[str]:
        """Returns the names of the examples without a caption, of those data sets that are in memory."""
        parts = zip(self._parts, self.weights, strict=False)  # a stream has no weights
        ranges = (numbers for part, (numbers, weight) in parts if weight and isinstance(part.rows, list))
        examples = map(self.__getitem__, chain.from_iterable(ranges))
        return [example.name for example in examples if not example.captions]

    def captions(self) -> Iterator[str]:
        """Yields every caption and written negative once, by reading the data set without its images."""
        texts = ((*example.captions, *example.negative_captions) for example in self._without_images())
        return iter(dict.fromkeys(chain.from_iterable(texts)))

    def _without_images(self) -> Iterator[Example]:
        for part, end in zip(self._parts, self._ends, strict=True):
            rows, columns = part.rows, replace(part.columns, image=None)
            if _is_plain(rows):
                rows = rows.select_columns(columns.stored(rows.column_names or ()))
                yield from (columns.example(row, number) for number, row in enumerate(rows))
            else:
                yield from map(self.__getitem__, range(end - len(rows), end))


def open_examples(
    data: Any,
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    negative_caption_column: str | None = None,
    split: str = "train",
    streaming: bool | None = None,
    exclude: str | Path | None = None,
) -> Examples:
    """Opens a data set and checks its columns.

    Args:
        data: Opened `Examples`, which are returned unchanged, or one of
            - a `datasets.Dataset` or `IterableDataset`
            - a folder of images with a text file beside each, or with a table of them; see `folders`
            - webdataset shards: a path or URL ending in `.tar`, a pattern of such, a list of them, a folder of them
            - a folder written by `Dataset.save_to_disk`
            - whatever else `datasets.load_dataset` takes: a name on the Hub, a folder of parquet files
            - a list of dicts, or any other map-style data set of dicts or of pairs (image, captions)
            - several of these: a list of paths, or a dict (also as a JSON text) from each to its weight, which is how
              often an epoch has each of its examples
        image_column: Column of the images; defaults to None, its usual names.
        caption_column: Column or columns of the captions; defaults to None, its usual names.
        negative_caption_column: Column of the written negatives; defaults to None, no written negatives.
        split: Split of a data set that has several; defaults to "train".
        streaming: Whether shards and data sets of the Hub are read without a prepared copy on the disk; defaults to
            None, which streams shards only.
        exclude: A folder that is not read where it lies in a folder of images, such as the output folder of the run;
            defaults to None.

    Raises:
        ValueError: A column is missing, the data set is empty, or a folder or a table cannot be read.
        TypeError: Captions are not strings, images not images, or `data` is none of these.
    """
    if isinstance(data, Examples):
        return data
    named = image_column, caption_column, negative_caption_column
    without = None if exclude is None else Path(exclude)
    loaded = _load(data, split, streaming, image_column, without)
    parts = [_open_part(rows, weight, *named) for rows, weight in loaded]
    if len(parts) > 1 and any(isinstance(part.rows, datasets.IterableDataset) for part in parts):
        raise ValueError(
            "several data sets with weights must be ones of known length, but a stream is among them; give "
            "streaming=False, or mix streams with datasets.interleave_datasets"
        )
    return Examples(parts, source=data if isinstance(data, str) else None)


def _is_plain(rows: Any) -> bool:
    """Returns whether the columns are stored ones, not made by the user's `set_transform`."""
    if isinstance(rows, datasets.Dataset):
        return rows.format["type"] != "custom"
    return isinstance(rows, datasets.IterableDataset)


def _open_part(rows: Any, weight: float, image: str | None, captions: Any, negatives: str | None) -> Part:
    """Finds the columns of rows, and checks the first row, or all rows of a list."""
    if _is_plain(rows):  # decoded here, so that a broken image can be told from a broken data set
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        rows = rows.with_format(None)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the training data is empty; give at least as many images as a batch holds")
    first = _as_mapping(first)
    columns = _find_columns(first, image, captions, negatives)
    for number, row in enumerate(rows if isinstance(rows, list) else [first]):  # a list is in memory already
        columns.example(row, number)
    with suppress(BrokenExample):  # skipped and counted when it is its turn
        image_size(columns.example(first, 0).image)
    return Part(rows.select_columns(columns.stored(first)) if _is_plain(rows) else rows, columns, weight)


def _load(
    data: Any, split: str, streaming: bool | None, image_column: str | None, exclude: Path | None
) -> list[tuple[Any, float]]:
    """Returns the rows of each given data set with its weight; errors as in `open_examples`."""
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"give one split of the data set, such as data[{next(iter(data))!r}]; it has {list(data)}")
    if isinstance(data, str) and data.lstrip().startswith("{"):
        data = parse_json(data, "the training data")
    if isinstance(data, str | Path):
        return _load_from(str(data), split, streaming, image_column, exclude)
    if isinstance(data, list | tuple) and data and all(isinstance(entry, str | Path) for entry in data):
        if all(str(entry).endswith(".tar") for entry in data):
            return [(_load_shards([str(entry) for entry in data], streaming), 1.0)]
        if all(Path(entry).expanduser().exists() for entry in data):
            data = dict.fromkeys(data, 1)
    if isinstance(data, Mapping) and data:
        if wrong := {key: w for key, w in data.items() if type(w) not in (int, float) or not 0 < w <= _MOST_REPEATS}:
            raise ValueError(
                f"each data set needs a weight, a positive number up to {_MOST_REPEATS}, but got {quoted(wrong)}; "
                'give several data sets as {"photos": 1, "paintings": 2.5}'
            )
        loaded = [(_load(source, split, streaming, image_column, exclude), weight) for source, weight in data.items()]
        return [(rows, inner * weight) for parts, weight in loaded for rows, inner in parts]
    if isinstance(data, datasets.IterableDataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return [(data, 1.0)]
    raise TypeError(
        "training data must be a data set, a path, a name, or a list of dicts (see open_examples), but got "
        f"{type(data).__name__}; make one of a generator with datasets.IterableDataset.from_generator"
    )


def _load_from(
    source: str, split: str, streaming: bool | None, image_column: str | None, exclude: Path | None
) -> list[tuple[Any, float]]:
    path = Path(source).expanduser()
    if source.endswith(".tar"):
        shards = [source] if "://" in source else sorted(glob(str(path)))
        if not shards:
            raise ValueError(f"no webdataset shard is at {source}")
        return [(_load_shards(shards, streaming), 1.0)]
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return [(load_table(path, file_column=image_column), 1.0)]
    if path.is_dir():
        shards = sorted(str(shard) for shard in path.glob("*.tar"))
        tables = (path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
        images = (file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)  # not read without shards
        if shards and not any(table.is_file() for table in tables) and next(images, None) is None:
            return [(_load_shards(shards, streaming), 1.0)]
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict) and split not in loaded:
                raise ValueError(f"{path} has no split {split!r}, only {', '.join(loaded)}; name one of them")
            return [(loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded, 1.0)]
        if (parts := load_folder(path, split, image_column, exclude)) is not None:
            return list(parts)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and "://" not in source:
        raise ValueError(f"there is no folder {one_line(source)}; give one with images, or the name of a data set")
    try:
        return [(datasets.load_dataset(str(path), split=split, streaming=bool(streaming)), 1.0)]
    except OSError as error:
        if path.exists():
            raise
        raise ValueError(
            f"there is no folder {one_line(source)}, and no data set of that name on the Hub could be read "
            f"({one_line(error, 300)}); give a folder with images, or the name of a data set"
        ) from error


def _load_shards(shards: list[str], streaming: bool | None) -> Any:
    try:
        return datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=streaming is not False)
    except tarfile.TarError as error:
        raise ValueError(f"one of {len(shards)} shards, from {shards[0]} on, is no whole tar file: {error}") from error


def _find_columns(row: Mapping[str, Any], image: str | None, captions: Any, negatives: str | None) -> Columns:
    inner = (f"{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value)
    present = [*row, *inner]  # columns, and the entries of those that hold JSON objects
    (image,) = _choose("image", present, image, _IMAGE_COLUMNS.split())
    captions = _choose("caption", present, captions, _CAPTION_COLUMNS.split())
    if negatives:
        _choose("negative_caption", present, negatives, ())
    return Columns(image, tuple(captions), negatives)


def _choose(kind: str, present: list[str], given: str | Sequence[str] | None, usual: Sequence[str]) -> list[str]:
    chosen = [given] if given and isinstance(given, str) else list(given or ())
    chosen = chosen or [name for name in usual if name in present]
    chosen = chosen or [name for name in present if name.strip().lower() in usual]
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


def _entry(row: Mapping[str, Any], column: str | None, name: str) -> Any:
    """Returns the entry `b` of column `a` for the column `a.b`, and None for no column."""
    if column is None:
        return None
    outer, _, inner = column.partition(".")
    if inner and outer in row:
        return (row[outer] or {}).get(inner)
    raise ValueError(f"{name} has no column {column!r}, only {list(row)}")
