"""Prompts to evaluate on: with an id, a category for tables, and whatever else their data set says of them.

load_prompts("captions_val2017.json")                   COCO captions
load_prompts("evaluation_metadata.jsonl")               GenEval, and any JSONL with a prompt in each line
load_prompts("PartiPrompts.tsv")                        PartiPrompts
load_prompts("prompts.txt")                             one prompt a line
load_prompts("user/prompts", column="text", split="test")   a data set of the Hub
load_prompts(["a red cat", "two dogs"])
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json, read_json_lines
from ..quoting import quoted

TEXT_COLUMNS = ("prompt", "Prompt", "text", "caption")
CATEGORY_COLUMNS = ("tag", "Category", "category")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Its name, unique among the prompts; pictures are filed under it.
        text: What the pipeline is asked for.
        category: What tables group it by, None for nothing.
        metadata: What else its source says of it; `image` is the path of a picture that belongs to it.
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
        source: A COCO captions `.json`, a `.jsonl` (GenEval's or any other), a `.tsv` with a head (PartiPrompts), a
            `.txt` with a prompt a line, a data set that `datasets.load_dataset` knows, or the prompts themselves.
        column: Column of the prompts; found by its name unless given.
        category_column: Column of the categories; `tag` (GenEval) or `Category` (PartiPrompts) unless given.
        split: Of a data set.
        limit: Only so many, from the start.
        images: Folder of COCO's images; the prompts then say which is theirs.
        captions_per_image: Of COCO's about five captions for each image.

    Raises:
        ValueError: The source holds no prompts, or two of the same id.
        OSError: There is no such file.
        ImportError: A data set is named but `datasets` is not installed.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix == ".json":
            prompts = _coco(path, None if images is None else Path(images), captions_per_image)
        elif path.suffix in _READERS:
            prompts = _from_rows(_READERS[path.suffix](path), str(path), column, category_column)
        elif path.is_file():
            raise ValueError(f"prompts are read from .json, .jsonl, .tsv and .txt files, but {path} is another one")
        else:
            prompts = _from_rows(_dataset(str(source), split, limit), str(source), column, category_column)
    else:
        prompts = _from_rows(list(source), "the list", column, category_column)
    prompts = prompts[:limit]
    if not prompts:
        raise ValueError(f"there are no prompts in {source!r:.80}; give a source with at least one")
    for prompt in prompts:
        _check(prompt)
    ids = {prompt.id for prompt in prompts}
    if len(ids) != len(prompts):
        raise ValueError(f"each prompt needs an id of its own, but {len(prompts)} prompts have {len(ids)} ids")
    if len({name.casefold() for name in ids}) != len(ids):
        twice = next(name for name in sorted(ids) if sum(name.casefold() == each.casefold() for each in ids) > 1)
        raise ValueError(f"ids must differ in more than case, as some disks do not tell {twice!r} from another one")
    return prompts


def _check(prompt: Prompt) -> None:
    """Raises if a prompt is not what files, tables and pipelines can hold."""
    words = {"id": prompt.id, "text": prompt.text, "category": prompt.category}
    for name, value in words.items():
        if not isinstance(value, str) and not (name == "category" and value is None):
            raise ValueError(f"the {name} of a prompt must be a string, but is {quoted(value)} in {quoted(prompt)}")
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" or sign == "\0" for sign in value):
            raise ValueError(
                f"the {name} of a prompt must be text, but {quoted(value)} holds half a character or a zero"
            )
    if not prompt.id.strip():
        raise ValueError(f"each prompt needs an id, but that of {quoted(prompt.text)} is empty")
    if prompt.category is not None and not prompt.category.strip():
        raise ValueError(f"a category must have a name, but that of prompt {prompt.id!r} is empty; None is for none")


def _coco(path: Path, images: Path | None, captions_per_image: int) -> list[Prompt]:
    content = read_json(path, max_bytes=1 << 30)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path} must be a COCO captions file with `images` and `annotations`; it is another JSON")
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    prompts = []
    for image in content["images"]:
        metadata = {"image_id": image["id"], "file_name": image["file_name"]}
        if images is not None:
            metadata["image"] = str(images / image["file_name"])
        for number, caption in enumerate(captions.get(image["id"], [])[:captions_per_image]):
            name = f"{image['id']:012d}"
            prompts.append(Prompt(name if captions_per_image == 1 else f"{name}-{number}", caption, None, metadata))
    return prompts


def _jsonl(path: Path) -> list[Any]:
    return [value for _, value in read_json_lines(path)]


def _tsv(path: Path) -> list[Any]:
    """Reads the rows; a quote opens a quoted cell only where a quote also ends it, as prompts may hold any."""
    heads, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [[_unquoted(cell) for cell in line.rstrip("\r").split("\t")] for line in lines if line.strip()]
    return [dict(zip(heads.rstrip("\r").split("\t"), row, strict=False)) for row in rows]


def _unquoted(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
    return next(csv.reader([cell]))[0] if quoted else cell


def _txt(path: Path) -> list[Any]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _dataset(name: str, split: str, limit: int | None) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file here; to read it as a data set of the Hub, `pip install datasets`"
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
        raise ValueError(f"a prompt is a string, a Prompt or a mapping, but number {number} of {where} is {row!r:.60}")
    text = next((name for name in (TEXT_COLUMNS if column is None else (column,)) if row.get(name)), None)
    if text is None:
        wanted = column or f"one of {', '.join(TEXT_COLUMNS)}"
        raise ValueError(f"prompts are in column {wanted}, but number {number} of {where} has only {sorted(row)}")
    names = CATEGORY_COLUMNS if category_column is None else (category_column,)
    given = next((row[name] for name in names if not _is_nothing(row.get(name))), None)
    category = None if given is None else _word(given, "category", number, where)
    metadata = {name: value for name, value in row.items() if name not in (text, "id")}
    words = row[text]
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"a prompt must be a text, but number {number} of {where} has {quoted(words)} in {text}")
    own = row.get("id")
    name = f"{number:05d}" if own is None else _word(own, "id", number, where)
    return Prompt(name, words.strip(), category, metadata)


def _word(value: Any, what: str, number: int, where: str) -> str:
    """Returns an id or a category as a string; whole numbers are written out."""
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
