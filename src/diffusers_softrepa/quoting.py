"""Shows foreign values and text in messages and Markdown pages as one short printable line."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any, final

_SURROGATE = re.compile("[\ud800-\udfff]")


@final
class _Short(reprlib.Repr):
    """A `repr` that is shortened at every level and works for values of any depth or size."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = limit

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 256:  # the interpreter refuses to write out thousands of digits
            return f"a whole number of {value.bit_length()} bits"
        return super().repr_int(value, level)


def quoted(value: Any, limit: int = 80) -> str:
    """Returns `repr(value)` as one line of printable characters, at most `limit` of them.

    Args:
        value: Any value; lists and mappings are shortened at every level, and if `repr` fails, its type is named.
        limit: Longest text to return, in characters.
    """
    try:
        text = _Short(limit).repr(value)
    except Exception:  # a foreign repr may raise anything
        text = f"a {type(value).__name__}"
    return one_line(text, limit)


def one_line(text: object, limit: int = 240) -> str:
    """Returns foreign text, such as another library's message, as one line of printable characters.

    Args:
        text: The text, or an exception whose text is meant.
        limit: Longest text to return, in characters; a longer one ends in `...`.
    """
    words = " ".join(str(text)[: 8 * limit].split())
    line = "".join(sign if sign.isprintable() else "?" for sign in words)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def is_text(text: str) -> bool:
    """Whether tokenizers and files take a text: it has no null character and no half of a character."""
    return "\0" not in text and not has_surrogate(text)


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a character (a lone surrogate of UTF-16), which cannot be encoded."""
    return _SURROGATE.search(text) is not None


def in_markdown(text: object, limit: int = 400) -> str:
    r"""Returns foreign text, such as a prompt, escaped so that Markdown shows it literally.

    The result is one line without headings, emphasis, code, links, images, HTML or comments, and can stand in a table.

    Args:
        text: The text.
        limit: Longest text to show, in characters before escaping; a longer one ends in `...`.
    """
    line = one_line(text, limit)
    line = re.sub(r"[&<>]", lambda sign: {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[sign[0]], line)
    line = re.sub(r"([\\`*\[\]|~])", r"\\\1", line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # one inside a word emphasizes nothing
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;")  # what pages turn into links by themselves
    line = re.sub(r"^([-+](?=[\s-]|$)|[#=])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def human_bytes(size: float) -> str:
    """Returns a number of bytes in the unit that keeps it short, powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of cells that are Markdown already; `in_markdown` makes them of foreign text.

    Args:
        heads: The head of each column.
        rows: The cells of each row.
    """
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
