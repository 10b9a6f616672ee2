"""Being asked to stop: SIGTERM lets the step in progress end first."""

import signal
from types import FrameType, TracebackType
from typing import Any, final


@final
class StopRequest:
    """Notes SIGTERM while it is entered, instead of dying of it; only the main thread can listen.

    Attributes:
        made: Whether it came.
    """

    def __init__(self) -> None:
        self.made = False
        self._former: Any = None

    def __enter__(self) -> "StopRequest":
        self.made = False
        try:
            self._former = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread
            self._former = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.made = True
