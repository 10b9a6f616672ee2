"""Atomic writing of files, and strict reading of text and JSON.

A file is written under a hidden name in the same folder and then renamed. So after a full disk, an interrupt or a
power failure there is either the old file or the complete new one. JSON is limited in size, depth and digits before it
is parsed, and every defect raises `UnreadableJSON`.
"""

import errno
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .quoting import has_surrogate, one_line, quoted

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
MAX_DIGITS = 64

_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|([\[{])|[\]}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableText(ValueError):
    """A file is not UTF-8 text; the message names the file and the line."""


class UnreadableJSON(ValueError):
    """A text is not valid JSON or exceeds a limit; the message names the file, the reason, and the line if known."""


# Writing


def check_places(
    folder: str | os.PathLike[str],
    files: Iterable[str] = (),
    folders: Iterable[str] = (),
    *,
    what: str = "the place to write to",
) -> None:
    """Checks that files and folders of these names can be written into a folder, which need not exist yet.

    Args:
        folder: The folder.
        files: Names of files, which may exist and are then replaced.
        folders: Names of folders, which may exist.
        what: What the folder is called in messages.

    Raises:
        TypeError: The folder is no path.
        ValueError: The folder, or one above it, is a file or may not be written; a name belongs to something else; or
            no file can have it.
    """
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise TypeError(f"{what} must be a path, but is {quoted(folder)}")
    if not os.fspath(folder):
        raise ValueError(f"{what} must be a folder, but its name is empty; name a folder")
    folder = Path(folder)
    _check_name(folder, what)
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists() or part.is_symlink())
    if not there.is_dir():
        kind = "file" if there.exists() else "link to nothing"
        raise ValueError(f"{what} must be a folder, but {one_line(there)} is a {kind}; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{what} must be writable, but {one_line(there)} is read-only; name another folder")
    for kind, names in (("file", files), ("folder", folders)):
        for path in (folder / name for name in names):
            _check_name(there / path.name, f"the name of a {kind}")
            if path.exists() and not (path.is_file() if kind == "file" else path.is_dir()):
                other = "folder" if path.is_dir() else "file" if path.is_file() else "device or pipe"
                raise ValueError(
                    f"{one_line(path)} must be a {kind}, but is a {other}; move it away, or name another folder"
                )


def _check_name(path: Path, what: str) -> None:
    """Raises a ValueError if no file can have this path: it is too long, or holds what file names cannot hold."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise ValueError(f"{what} cannot be {quoted(str(path))}: {reason}") from error


def write_whole(path: str | os.PathLike[str], content: bytes | str, *, durable: bool = True) -> None:
    """Writes a file so that it appears complete or not at all.

    Args:
        path: The file; its folder must exist. What was there before is replaced.
        content: The content of the file; a string is written as UTF-8.
        durable: Whether to wait until the content is on the disk, so that it survives a power failure.

    Raises:
        OSError: It cannot be written; the file that was there before is untouched.
    """
    content = content.encode() if isinstance(content, str) else content
    with whole_file(path, durable=durable) as file:
        file.write(content)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file to be written, which appears complete when the block ends and not at all if it raises.

        with whole_file("image.png") as file:
            image.save(file, format="PNG")

    Args:
        path: The file; its folder must exist. What was there before is replaced.
        durable: Whether to wait until the content is on the disk, so that it survives a power failure.

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
    """Renames a complete file or folder to its final name, in one step.

    Args:
        partial: The complete file or folder, on the same disk.
        path: Its final name. An existing file or empty folder of that name is replaced.
        durable: Whether to wait until the new name is on the disk.

    Raises:
        OSError: It cannot be renamed.
    """
    os.replace(partial, path)
    if durable:
        sync_folder(Path(path).parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Waits until the names in a folder are on the disk; does nothing on systems that cannot sync folders."""
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
    """Returns the value in a JSON file.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        max_bytes: Longest file that is read.
        max_depth: How deep lists and objects may be nested.
        allow_nonfinite: Whether `NaN`, `Infinity` and numbers beyond float64 are accepted; Python writes them, though
            they are not JSON.

    Raises:
        UnreadableJSON: It is not valid JSON, exceeds a limit, or has the same key twice in one object.
        OSError: There is no such file, or it cannot be read.
    """
    where = one_line(os.fspath(path))
    if not Path(path).is_file() and Path(path).exists():  # a folder, or a pipe that would never end
        raise OSError(f"{where} is no file that can be read")
    with Path(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    return parse_json(content, where, max_bytes=max_bytes, max_depth=max_depth, allow_nonfinite=allow_nonfinite)


def read_lines(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> list[str]:
    """Returns the lines of a text file, without their line ends.

    A line ends with a newline, with or without a carriage return; separators of Unicode such as U+2028 end no line.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        max_bytes: Longest file that is read.

    Raises:
        UnreadableText: It is in another encoding, or too long; the message names the file and the line.
        OSError: There is no such file, or it cannot be read.
    """
    where = one_line(os.fspath(path))
    if not Path(path).is_file() and Path(path).exists():
        raise OSError(f"{where} is no file that can be read")
    with Path(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnreadableText(f"{where} is longer than {max_bytes:,} bytes, the most that is read")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1] if len(lines) > 1 and not lines[-1] else lines, start=1):
        try:
            if b"\0" in line:  # as UTF-16 and UTF-32 have them
                raise ValueError
            found.append(line.decode().removesuffix("\r"))
        except ValueError as error:
            raise UnreadableText(
                f"line {number} of {where} is not UTF-8 text; save the file as UTF-8 and try again"
            ) from error
    return found


def read_json_lines(
    path: str | os.PathLike[str],
    *,
    torn_end: bool = False,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_nonfinite: bool = False,
    allow_surrogates: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Yields number (from 1) and value of each line of a JSON Lines file.

    Empty lines are skipped.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.
        torn_end: Whether an incomplete last line, as a killed process leaves it, is skipped.
        max_bytes: Longest line that is read.
        max_depth: How deep lists and objects may be nested.
        allow_nonfinite: Whether `NaN`, `Infinity` and numbers beyond float64 are accepted.
        allow_surrogates: Whether strings may hold lone surrogates, for callers that check them themselves.

    Raises:
        UnreadableJSON: A line is not valid JSON or exceeds a limit; the message names the line.
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
                    allow_surrogates=allow_surrogates,
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
    allow_surrogates: bool = False,
) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: The text; bytes are UTF-8, with or without a byte order mark.
        where: Name of the text in messages, such as `"the metadata of adapter.safetensors"`.
        max_bytes: Longest text that is read.
        max_depth: How deep lists and objects may be nested.
        allow_nonfinite: Whether `NaN`, `Infinity` and numbers beyond float64 are accepted.
        allow_surrogates: Whether strings may hold lone surrogates, for callers that check them themselves.

    Raises:
        UnreadableJSON: It is not valid JSON, exceeds a limit, or has the same key twice in one object.
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
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.rstrip() else f"column {error.colno}"
        raise UnreadableJSON(f"{where} is not JSON: {one_line(error.msg, 80)} at {place}") from error
    if not allow_surrogates and _SURROGATE.search(text) and not _is_unicode(value):
        raise UnreadableJSON(
            f"{where} holds half of a character (a lone surrogate such as \\ud83d), which no text has"
        )
    return value


class _Hooks:
    """Callbacks of `json.loads` for numbers, constants and objects."""

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
    """Whether all strings in a value can be encoded as UTF-8."""
    if isinstance(value, str):
        return not has_surrogate(value)
    if isinstance(value, Mapping):
        return all(_is_unicode(key) and _is_unicode(entry) for key, entry in value.items())
    return all(map(_is_unicode, value)) if isinstance(value, list) else True
