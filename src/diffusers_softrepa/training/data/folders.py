"""Folders of images with a text file beside each image, or one table for all of them.

    photos/cat.png + photos/cat.txt               a `.txt` or `.caption` file beside each image; a caption on each line
    photos/10_cat/1.png + photos/10_cat/1.txt     10 repeats of the images of a sub-folder, as in kohya's scripts
    photos/images/cat.png + photos/captions.csv   a table: .jsonl, .csv, .tsv, .json or .parquet
    photos/train/cat.png + photos/train/metadata.jsonl

Sub-folders are read as well. Hidden files, and the masks that OneTrainer keeps beside its images, are not.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ...files import parse_json, read_json_lines, read_lines
from ...quoting import one_line, quoted

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff .avif .heic .heif .jxl .jp2 .ppm .pgm"
_COLUMNS = "file_name filename file file_path filepath image image_path image_file image_name img img_path path"
IMAGE_SUFFIXES, FILE_COLUMNS = frozenset(_SUFFIXES.split()), _COLUMNS.split()
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
_TABLE_NAMES = ("captions", "caption", "prompts", "labels")
_CAPTION_SUFFIXES = (".txt", ".caption")
_DATA_SUFFIXES = (*TABLE_SUFFIXES, ".arrow", ".gz", ".zip", ".zst", ".xz", ".bz2")
_REPEATED = re.compile(r"([0-9]{1,3})_(.+)")  # more digits are a year or a date


def load_folder(
    folder: Path, split: str, file_column: str | None = None, exclude: Path | None = None
) -> list[tuple[Rows, float]] | None:
    """Reads a folder of images.

    Args:
        folder: An existing folder.
        split: Sub-folder to read instead, if it exists and there is no table beside it.
        file_column: Column of a table that names the image files; defaults to None, its usual names.
        exclude: A folder that is not read where it lies in this one; defaults to None.

    Returns:
        Rows with the path of an `image` and the columns of the table or `text`, and how often an epoch has them; None
        for a folder of data files, which `datasets` reads.

    Raises:
        ValueError: There are images but no captions, a file is not UTF-8, a table names files that do not exist, or
            the folder itself is excluded.
    """
    exclude = None if exclude is None else exclude.resolve()
    if folder.resolve() == exclude:
        raise ValueError(
            f"{folder} is the folder of the data and of the output too, whose images would join them; choose another "
            "output_dir"
        )
    files = sorted(_files(folder, exclude))
    if not files:
        raise ValueError(
            f"{folder} is empty; put images and a metadata.jsonl there, or images with a text file beside each"
        )
    images = [path for path in files if _is_image(path)]
    tables = [path for suffix in TABLE_SUFFIXES for path in files if path.suffix.lower() == suffix]
    metadata = [path for path in tables if path.stem.lower() == "metadata"]
    if split and (folder / split).is_dir() and not any(path.parent == folder for path in metadata):
        return load_folder(folder / split, "", file_column, exclude)
    if not images and all(path.suffix == ".parquet" for path in metadata):
        if any(path.suffix.lower() in _DATA_SUFFIXES for path in files):
            return None
        raise _unrecognised(folder, files)
    if split not in ("", "train"):
        raise ValueError(
            f"{folder} has no split {split!r}, which is a sub-folder with captions of its own; name another"
        )
    chosen = list({path.parent: path for path in reversed(metadata)}.values())  # one for each folder
    if not chosen and (found := _captioned(folder, files, images)):
        return found
    if not chosen:
        usable = [path for path in tables if _names_files(path, file_column)]
        chosen = [path for path in usable if path.stem.lower() in _TABLE_NAMES] or usable
        if len(chosen) > 1:
            raise ValueError(
                f"{folder} has several tables of images, {_shown(folder, chosen)}; rename the one to read to metadata"
            )
    if not chosen:
        raise _unrecognised(folder, files)
    loaded = [load_table(path, images, file_column) for path in sorted(chosen)]
    named = {os.path.normpath(row["image"]) for rows in loaded for row in rows if isinstance(row["image"], Path)}
    if unnamed := [path for path in images if os.path.normpath(path) not in named]:
        logger.warning(
            "%d of %d images are left out, because no row of a table names them: %s",
            *(len(unnamed), len(images), _shown(folder, unnamed)),
        )
    return [(rows, 1.0) for rows in loaded if rows] or [([], 1.0)]


def load_table(table: Path, images: Iterable[Path] = (), file_column: str | None = None) -> Rows:
    """Reads a table of image files and captions, one image a row.

    Args:
        table: A file with one of `TABLE_SUFFIXES`.
        images: Image files to search by name for those that are not where the table says.
        file_column: Column of the image files; defaults to None, its usual names.

    Returns:
        The rows, with the path or URL of the `image`.

    Raises:
        ValueError: It is not such a table, or names files that do not exist.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        for known in {path.name, path.stem}:
            by_name[known].append(path)
    rows: Rows = []
    missing: list[str] = []
    for where, row in _read_table(table):
        column = _file_column(row, file_column)
        name = row[column] if column else None
        if isinstance(name, dict) and (name.get("bytes") or name.get("path")):  # as `datasets` writes parquet files
            rows.append({**row, "image": name})
            continue
        if not isinstance(name, str) or not name or "\0" in name:
            such = "below a heading such as file_name,text"
            such = 'as {"file_name": "cat.jpg", "text": "a cat"} does' if table.suffix == ".jsonl" else such
            raise ValueError(f"every row of {table} must name an image file, {such}, but {where} is {quoted(row)}")
        found = name if "://" in name else _find(table.parent, name, by_name)
        missing += [] if found else [f"{name} ({where})"]
        rows.append({**row, **({file_column: found} if file_column else {}), "image": found})
    if missing:
        raise ValueError(
            f"{table} names {len(missing)} of {len(rows)} files that do not exist: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return rows


def _files(folder: Path, exclude: Path | None) -> Iterator[Path]:
    def is_read(inner: Path) -> bool:
        return not (inner.name.startswith((".", "__")) or _is_loop(inner) or (exclude and inner.resolve() == exclude))

    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if is_read(Path(parent, name))]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _is_loop(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in."""
    return folder.is_symlink() and any(map(folder.samefile, folder.absolute().parents))


def _shown(folder: Path, paths: list[Path]) -> str:
    return ", ".join(str(path.relative_to(folder)) for path in paths[:4]) + (", ..." if len(paths) > 4 else "")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith(("-masklabel", "-condlabel"))


def _captioned(folder: Path, files: Iterable[Path], images: Iterable[Path]) -> list[tuple[Rows, float]]:
    """Returns the images with their repeats, if some have a caption file or a sub-folder that names a subject."""
    texts: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in _CAPTION_SUFFIXES:
            texts[path.with_suffix("")].append(path)
    parts: dict[Path, Rows] = defaultdict(list)  # by the nearest folder with a number of repeats
    for path in images:
        captions = [line for text in texts[path.with_suffix("")] or texts[path] for line in read_lines(text)]
        inner = (parent for parent in path.parents if folder in parent.parents)
        part = next((parent for parent in inner if _REPEATED.fullmatch(parent.name)), folder)
        parts[part].append({"image": path, "text": captions})
    found = []
    for part, rows in parts.items():
        repeats = _REPEATED.fullmatch(part.name) if part != folder else None
        if repeats and not any(row["text"] for row in rows):  # as kohya's scripts do without caption files
            rows = [{**row, "text": [repeats[2].replace("_", " ")]} for row in rows]
        if repeats:
            logger.info(
                "%s: each of %d images comes %s times in an epoch", part.relative_to(folder), len(rows), repeats[1]
            )
        found.append((rows, float(repeats[1]) if repeats else 1.0))
    return found if any(row["text"] for rows, _ in found for row in rows) else []


def _read_table(table: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place of each row, for messages, and the row; errors as in `load_table`."""
    kind = table.suffix.lower()
    if kind == ".jsonl":
        for number, row in read_json_lines(table, allow_nonfinite=True, allow_surrogates=True):
            yield f"line {number}", row
    elif kind in (".csv", ".tsv"):
        yield from _read_csv(table)
    elif kind == ".parquet":
        from pyarrow import parquet

        for number, row in enumerate(parquet.read_table(table).to_pylist(), start=1):
            yield f"row {number}", row
    else:
        rows = parse_json(table.read_bytes(), one_line(table), allow_nonfinite=True, allow_surrogates=True)
        if isinstance(rows, dict):  # captions by file
            entries = {name: row if isinstance(row, dict) else {"text": row} for name, row in rows.items()}
            rows = [{"file_name": name, **entry} for name, entry in entries.items()]
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
            yield f"entry {number}", row


def _read_csv(table: Path) -> Iterator[tuple[str, Any]]:
    lines = read_lines(table)
    blank = next((number for number, line in enumerate(lines) if line.strip()), len(lines))  # lines before the heading
    if blank == len(lines):
        return
    sign = max(",;\t|", key=lines[blank].count)
    text = [f"{line}\n" for line in lines[blank:]]
    reader: Any = csv.DictReader(text, delimiter=sign, skipinitialspace=True, strict=True)
    try:
        heading = [name.strip() for name in reader.fieldnames]
        if twice := [name for name in heading if name and heading.count(name) > 1]:
            raise ValueError(f"the heading of {table} has the column {quoted(twice[0])} twice; rename one of them")
        index = heading[0] == ""  # as pandas writes it
        for row in reader:
            if any(row.pop(None, ())) or (row.get("") and not index):
                raise ValueError(
                    f"line {blank + reader.line_num} of {table} has more fields than the heading; put captions that "
                    f"hold {quoted(sign)} between double quotes"
                )
            yield f"line {blank + reader.line_num}", {(name or "").strip(): value for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"line {blank + reader.line_num + 1} of {table} cannot be read: {error}") from error


def _file_column(row: Any, given: str | None) -> str | None:
    """Returns the given column of image files, or the one of a usual name; None if the row does not have it."""
    names = {name.strip().lower().replace(" ", "_"): name for name in row} if isinstance(row, dict) else {}
    usual = next((names[name] for name in FILE_COLUMNS if name in names), None)
    return usual if given is None else given if given in names.values() else None


def _names_files(table: Path, file_column: str | None) -> bool:
    with suppress(ValueError):
        return any(_file_column(row, file_column) for _, row in islice(_read_table(table), 1))
    return False


def _find(folder: Path, name: str, by_name: dict[str, list[Path]]) -> Path | None:
    """Returns the file that a table means: at the written path, in `images/`, or the only one of that name."""
    written = name.replace("\\", "/")
    paths = [folder / name, folder / written, folder / "images" / written]
    same = by_name.get(Path(written).name, [])
    return next((path for path in paths if path.is_file()), same[0] if len(same) == 1 else None)


def _unrecognised(folder: Path, files: list[Path]) -> ValueError:
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in files)
    images = [path for path in files if _is_image(path)]
    first = images[0].relative_to(folder) if images else Path("cat.png")
    shown = quoted(_shown(folder, files), 160)[1:-1]
    return ValueError(
        f"{folder} has {'images but no captions' if images else 'no images'} that can be recognised: found "
        f"{', '.join(f'{count} {kind}' for kind, count in kinds.most_common(6))} ({shown}); write "
        f"each caption into a text file beside its image, such as {first.with_suffix('.txt')} for {first}, or all "
        f'into a metadata.jsonl with lines such as {{"file_name": "{first}", "text": "a cat on a mat"}}'
    )
