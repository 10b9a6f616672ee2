"""Files as every room writes and reads them: written whole or not at all, and JSON read strictly.

A file is written beside its place under a hidden name and renamed into it, so that a reader, a full disk, an interrupt
or a power cut meets the old file or the new one. JSON that comes from elsewhere is bounded in size, depth and digits
before anything is built from it, and whatever is wrong with it is one kind of error, `UnreadableJSON`.
"""

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .quoting import one_line, quoted

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
MAX_DIGITS = 64

_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|([\[{])|[\]}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableJSON(ValueError):
    """A text is no JSON that this package reads; the message names the file, the line where one is known, and why."""


# Writing


def write_whole(path: str | os.PathLike[str], content: bytes | str, *, durable: bool = True) -> None:
    """Writes a file so that it appears complete or not at all.

    Args:
        path: The file; its folder must exist. What was there before is replaced.
        content: What it is to hold; text is written as UTF-8.
        durable: Whether to wait until the disk has it, so that a power cut leaves the old file or the new one too.

    Raises:
        OSError: It cannot be written; the file that was there before is untouched.
    """
    content = content.encode() if isinstance(content, str) else content
    with whole_file(path, durable=durable) as file:
        file.write(content)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file to be written, which appears complete when the block ends and not at all if it raises.

        with whole_file("picture.png") as file:
            image.save(file, format="PNG")

    Args:
        path: The file; its folder must exist. What was there before is replaced.
        durable: Whether to wait until the disk has it, so that a power cut leaves the old file or the new one too.

    Raises:
        OSError: It cannot be written; the message names the file, and the one that was there before is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        move_into_place(partial, path, durable=durable)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, os.fspath(partial)):
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise


def move_into_place(partial: str | os.PathLike[str], path: str | os.PathLike[str], *, durable: bool = True) -> None:
    """Renames a complete file or folder to the name under which others look for it, in one step.

    Args:
        partial: The complete file or folder, on the same disk.
        path: Its name from now on. A file, or an empty folder, that has it is replaced.
        durable: Whether to wait until the disk has the new name.

    Raises:
        OSError: It cannot be renamed.
    """
    os.replace(partial, path)
    if durable:
        sync_folder(Path(path).parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Waits until the disk has the names in a folder; does nothing where the system cannot be asked to."""
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(handle)


# Reading


def read_json(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nonfinite: bool = False,
) -> Any:
    """Returns what a JSON file holds.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        max_bytes: Longest file that is read.
        max_depth: How many lists and objects may stand in one another.
        allow_nonfinite: Whether `NaN`, `Infinity` and numbers beyond float64 are taken; no JSON, but Python writes it.

    Raises:
        UnreadableJSON: It is no such JSON, or a key stands twice in one object.
        OSError: There is no such file, or it cannot be read.
    """
    where = one_line(os.fspath(path))
    if not Path(path).is_file() and Path(path).exists():  # a folder, or a pipe that would never end
        raise OSError(f"{where} is no file that can be read")
    with Path(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    return parse_json(content, where, max_bytes=max_bytes, max_depth=max_depth, allow_nonfinite=allow_nonfinite)


def read_json_lines(
    path: str | os.PathLike[str],
    *,
    torn_end: bool = False,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nonfinite: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Reads a file with a JSON text on each line and yields each line's number, from 1, and value.

    Empty lines are skipped.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        torn_end: Whether a last line without an end, such as a killed writer leaves, is left out if it is no JSON.
        max_bytes: Longest line that is read.
        max_depth: How many lists and objects may stand in one another.
        allow_nonfinite: Whether `NaN`, `Infinity` and numbers beyond float64 are taken.

    Raises:
        UnreadableJSON: A line is no such JSON; the message names it.
        OSError: There is no such file, or it cannot be read.
    """
    where = one_line(os.fspath(path))
    if not Path(path).is_file() and Path(path).exists():
        raise OSError(f"{where} is no file that can be read")
    with Path(path).open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(max_bytes + 1), b""), start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not content.strip():
                continue
            try:
                value = parse_json(
                    content,
                    f"line {number} of {where}",
                    max_bytes=max_bytes,
                    max_depth=max_depth,
                    allow_nonfinite=allow_nonfinite,
                )
            except UnreadableJSON:
                if torn_end and not line.endswith(b"\n") and len(line) <= max_bytes:
                    return
                raise
            yield number, value


def parse_json(
    text: str | bytes,
    where: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nonfinite: bool = False,
) -> Any:
    """Returns what a JSON text holds.

    Args:
        text: The text; bytes are UTF-8, with or without a byte order mark.
        where: What the text is, for messages, such as `"the metadata of adapter.safetensors"`.
        max_bytes: Longest text that is read.
        max_depth: How many lists and objects may stand in one another.
        allow_nonfinite: Whether `NaN`, `Infinity` and numbers beyond float64 are taken.

    Raises:
        UnreadableJSON: It is no such JSON, or a key stands twice in one object.
    """
    if len(text) > max_bytes:
        raise UnreadableJSON(f"{where} is longer than {max_bytes:,} bytes, the most that is read")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnreadableJSON(f"{where} is not UTF-8 text: byte {error.start} cannot be read") from error
    _check_depth(text, where, max_depth)
    hooks = _Hooks(where, allow_nonfinite=allow_nonfinite)
    try:
        value = json.loads(
            text,
            parse_int=hooks.whole,
            parse_float=hooks.number,
            parse_constant=hooks.constant,
            object_pairs_hook=hooks.mapping,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UnreadableJSON(f"{where} is not JSON: {one_line(error.msg, 80)} at {place}") from error
    if _SURROGATE.search(text) and not _is_unicode(value):
        raise UnreadableJSON(
            f"{where} holds half of a character (a lone surrogate such as \\ud83d), which no text has"
        )
    return value


class _Hooks:
    """What the reader calls for each number, constant and object."""

    def __init__(self, where: str, *, allow_nonfinite: bool) -> None:
        self._where, self._allow_nonfinite = where, allow_nonfinite

    def whole(self, digits: str) -> int:
        self._check_digits(digits)
        return int(digits)

    def number(self, digits: str) -> float:
        self._check_digits(digits)
        value = float(digits)
        if not math.isfinite(value) and not self._allow_nonfinite:
            raise UnreadableJSON(f"{self._where} holds the number {digits}, which is too large to be one")
        return value

    def constant(self, name: str) -> float:
        if not self._allow_nonfinite:
            raise UnreadableJSON(f"{self._where} holds {name}, which is no number of JSON")
        return float(name)

    def mapping(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in found if keys.count(key) > 1)
            raise UnreadableJSON(f"{self._where} holds the key {quoted(twice)} twice in one object")
        return found

    def _check_digits(self, digits: str) -> None:
        if len(digits) > MAX_DIGITS:
            raise UnreadableJSON(
                f"{self._where} holds a number of {len(digits)} digits, but {MAX_DIGITS} are the most"
            )


def _check_depth(text: str, where: str, max_depth: int) -> None:
    depth = 0
    for match in _BRACKETS.finditer(text):
        sign = match.group()
        if sign[0] == '"':
            continue
        depth += 1 if match.group(1) else -1
        if depth > max_depth:
            raise UnreadableJSON(f"{where} is nested more than {max_depth} levels deep, the most that is read")


def _is_unicode(value: Any) -> bool:
    """Whether all texts in a value can be written as UTF-8."""
    if isinstance(value, str):
        return not any("\ud800" <= sign <= "\udfff" for sign in value)
    if isinstance(value, Mapping):
        return all(_is_unicode(key) and _is_unicode(entry) for key, entry in value.items())
    return all(map(_is_unicode, value)) if isinstance(value, list) else True
