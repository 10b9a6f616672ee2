"""Prompts for an evaluation, each with an id, a category for tables, and the other fields of its data set.

load_prompts("captions_val2017.json")                   COCO captions
load_prompts("evaluation_metadata.jsonl")               GenEval, and any JSONL with a prompt in each line
load_prompts("PartiPrompts.tsv")                        PartiPrompts
load_prompts("prompts.txt")                             one prompt on each line
load_prompts("user/prompts", column="text", split="test")   a data set of the Hub
load_prompts(["a red cat", "two dogs"])
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json, read_json_lines, read_lines
from ..quoting import is_text, quoted

TEXT_COLUMNS = ("prompt", "Prompt", "text", "caption")
CATEGORY_COLUMNS = ("tag", "Category", "category")
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Prompt:
    """One prompt of an evaluation.

    Attributes:
        id: Name of the prompt, unique among the prompts; part of the file names of its images.
        text: Text that the pipeline is called with.
        category: Group of the prompt in tables. Defaults to None, for no group.
        metadata: Further fields of its source. `image` is the path of an image that belongs to the prompt.
    """

    id: str
    text: str
    category: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(
    source: str | os.PathLike[str] | Iterable[str | Prompt | Mapping[str, Any]],
    *,
    column: str | None = None,
    category_column: str | None = None,
    split: str = "test",
    limit: int | None = None,
    images: str | os.PathLike[str] | None = None,
    captions_per_image: int = 1,
) -> list[Prompt]:
    """Returns the prompts of a source.

    Args:
        source: A file of COCO captions (`.json`), a `.jsonl` file such as GenEval's, a `.tsv` file with column names
            in its first line such as PartiPrompts, a `.txt` file with one prompt on each line, a data set that
            `datasets.load_dataset` knows, or the prompts themselves.
        column: Column of the prompts. Defaults to the first of `prompt`, `Prompt`, `text` and `caption`.
        category_column: Column of the categories. Defaults to the first of `tag` (GenEval), `Category` (PartiPrompts)
            and `category`.
        split: Split of a data set. Defaults to `test`.
        limit: Number of prompts to take from the start. Defaults to all.
        images: Folder of COCO's images. If given, each prompt has the path of its image in its metadata.
        captions_per_image: Number of captions to take of the about five that COCO has for each image. Defaults to 1.

    Raises:
        ValueError: The source has no prompts, two prompts have the same id, or a file cannot be read as its format;
            the message names the file and the line.
        OSError: The file does not exist.
        ImportError: The source is a data set and the package `datasets` is not installed.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix == ".json":
            prompts = _coco(path, None if images is None else Path(images), captions_per_image)
        elif path.suffix in _READERS:
            prompts = _from_rows(_READERS[path.suffix](path), str(path), column, category_column)
        elif path.is_file():
            raise ValueError(f"prompts are read from .json, .jsonl, .tsv and .txt files, but the file is {path}")
        else:
            prompts = _from_rows(_dataset(str(source), split, limit), str(source), column, category_column)
    elif isinstance(source, Iterable):
        prompts = _from_rows(list(source), "the list", column, category_column)
    else:
        raise TypeError(f"prompts must be a file, a data set or a list of strings, but are {quoted(source)}")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(
            f"limit must be a whole number of at least 1, or None for all prompts, but is {quoted(limit)}"
        )
    prompts = prompts[:limit]
    if not prompts:
        raise ValueError(f"there are no prompts in {quoted(source)}; give a source with at least one")
    for prompt in prompts:
        _check(prompt)
    ids = {prompt.id for prompt in prompts}
    if len(ids) != len(prompts):
        raise ValueError(f"each prompt needs an id of its own, but {len(prompts)} prompts have {len(ids)} ids")
    if len({name.casefold() for name in ids}) != len(ids):
        twice = next(name for name in sorted(ids) if sum(name.casefold() == each.casefold() for each in ids) > 1)
        raise ValueError(f"ids must differ in more than case, because some disks ignore case, but {twice!r} does not")
    return prompts


def _check(prompt: Prompt) -> None:
    """Checks that files, tables and pipelines can hold a prompt."""
    words = {"id": prompt.id, "text": prompt.text, "category": prompt.category}
    for name, value in words.items():
        if not isinstance(value, str) and not (name == "category" and value is None):
            raise ValueError(f"the {name} of a prompt must be a string, but is {quoted(value)} in {quoted(prompt)}")
        if isinstance(value, str) and not is_text(value):
            raise ValueError(
                f"the {name} of a prompt must be text, but {quoted(value)} has a lone surrogate or a null character"
            )
    if not prompt.id.strip():
        raise ValueError(f"each prompt needs an id, but that of {quoted(prompt.text)} is empty")
    if prompt.category is not None and not prompt.category.strip():
        raise ValueError(f"the category of prompt {prompt.id!r} is empty; give None for no category")


def _coco(path: Path, images: Path | None, captions_per_image: int) -> list[Prompt]:
    content = read_json(path, max_bytes=_MAX_BYTES)
    try:
        captions: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a COCO captions file, with `images` (id, file_name) and `annotations` (image_id, "
            f"caption), but is not ({quoted(error)}); give other prompts as .jsonl, .tsv or .txt"
        ) from error
    prompts = []
    for number, file_name in files.items():
        metadata = {"image_id": number, "file_name": file_name}
        if images is not None:
            metadata["image"] = str(images / file_name)
        for which, caption in enumerate(captions.get(number, [])[:captions_per_image]):
            name = f"{number:012d}"
            prompts.append(Prompt(name if captions_per_image == 1 else f"{name}-{which}", caption, None, metadata))
    return prompts


def _jsonl(path: Path) -> list[Any]:
    return [row for _, row in read_json_lines(path, allow_nonfinite=True)]


def _tsv(path: Path) -> list[Any]:
    """Returns the rows. A quote begins a quoted cell only if a quote also ends it, as prompts may contain quotes."""
    lines = read_lines(path, max_bytes=_MAX_BYTES)
    heads = lines[0].split("\t")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = [_unquoted(cell) for cell in line.split("\t")]
        if len(cells) > len(heads):
            raise ValueError(f"line {number} of {path} has {len(cells)} cells, but the first line names {len(heads)}")
        if line.strip():
            rows.append(dict(zip(heads, cells, strict=False)))
    return rows


def _unquoted(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
    return next(csv.reader([cell]))[0] if quoted else cell


def _txt(path: Path) -> list[Any]:
    return [line.strip() for line in read_lines(path, max_bytes=_MAX_BYTES) if line.strip()]


def _dataset(name: str, split: str, limit: int | None) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file; to load it as a data set of the Hub, `pip install datasets`"
        ) from error
    rows = datasets.load_dataset(name, split=split)
    return [dict(row) for row in (rows if limit is None else rows.take(limit))]


_READERS = {".jsonl": _jsonl, ".tsv": _tsv, ".txt": _txt}


def _from_rows(rows: Sequence[Any], where: str, column: str | None, category_column: str | None) -> list[Prompt]:
    return [_prompt(row, number, where, column, category_column) for number, row in enumerate(rows)]


def _prompt(row: Any, number: int, where: str, column: str | None, category_column: str | None) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        return Prompt(f"{number:05d}", row)
    if not isinstance(row, Mapping):
        raise ValueError(
            f"a prompt is a string, a Prompt or a mapping, but number {number} of {where} is {quoted(row)}"
        )
    text = next((name for name in (TEXT_COLUMNS if column is None else (column,)) if row.get(name)), None)
    if text is None:
        wanted = column or f"one of {', '.join(TEXT_COLUMNS)}"
        raise ValueError(f"prompts must be in column {wanted}, but number {number} of {where} has {quoted(list(row))}")
    names = CATEGORY_COLUMNS if category_column is None else (category_column,)
    given = next((row[name] for name in names if not _is_nothing(row.get(name))), None)
    category = None if given is None else _word(given, "category", number, where)
    metadata = {name: value for name, value in row.items() if name not in (text, "id")}
    words = row[text]
    if not isinstance(words, str) or not words.strip():
        raise ValueError(
            f"a prompt must be a string that is not empty, but number {number} of {where} has {quoted(words)}"
        )
    own = row.get("id")
    name = f"{number:05d}" if own is None else _word(own, "id", number, where)
    return Prompt(name, words.strip(), category, metadata)


def _word(value: Any, what: str, number: int, where: str) -> str:
    """Returns an id or a category as a string; a whole number is converted."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"the {what} must be a string or a whole number, but number {number} of {where} has {quoted(value)}"
    )


def _is_nothing(value: Any) -> bool:
    """Whether a cell of a table is empty."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
