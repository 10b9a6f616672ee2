"""Standard output and error that survive a closed pipe and characters that the encoding lacks."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def survivable_output() -> Iterator[None]:
    """Replaces standard output and error by streams to which a command can always write.

    A character that the encoding of the output lacks is written as an escape such as `\\u0436`. After the reader of a
    pipe, such as `head`, has closed it, further output is dropped and the command continues.
    """
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Survivor(old[0]), _Survivor(old[1])
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = old


class _Survivor(io.TextIOBase):
    """A text stream that writes to another stream and remains usable when that one fails."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is None:  # a process without a console
            return len(text)
        with self._unbroken():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._unbroken():
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            with suppress(OSError, io.UnsupportedOperation):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(
                    null, self._stream.fileno()
                )  # so that flushing the buffer, also when the interpreter exits, succeeds
                os.close(null)
