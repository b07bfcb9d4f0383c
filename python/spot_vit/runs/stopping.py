"""Signals that end a run: noted, and heeded between two steps; or heeded at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stop:
    """A context in which SIGINT and SIGTERM ask for a stop, which the loop looks for.

    A second SIGINT interrupts at once, as Python does; within `at_once` the first one does. In a
    thread other than the main one, where Python takes no signals, nothing is noted.

    Attributes:
        signal: number of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._text: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, text: str) -> Iterator[None]:
        """A context in which a signal, or one that came before, raises Stopped wherever it comes.

        Args:
            text: of Stopped.
        """
        self._text = text
        try:
            if self.signal:
                raise Stopped(self.signal, text)
            yield
        finally:
            self._text = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        text, self._text = self._text, None
        if text is not None:
            raise Stopped(number, text)


class Stopped(BaseException):
    """A signal ended the run, which is saved where it had begun.

    As KeyboardInterrupt it is no Exception, so that nothing takes it for a fault of what it ended.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal
