"""Signals that end a run: what is being made is finished first, a second signal ends it at once.

Within :func:`handled`, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`, as does a reader that goes away; within a
:func:`unit` only once it is finished.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_units: list[str] = []
_asked = 0
logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A signal's wish that the run end. ``number``: the signal's; ``kept``: what there is of the run, in words."""

    def __init__(self, number: int) -> None:
        self.number, self.kept = number, "nothing was written"

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.kept}"


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Obeys signals within the block. Only a main thread may; elsewhere the host program decides what they mean. One
    that is ignored, as SIGHUP under nohup, stays so."""
    global _asked
    numbers: list[int] = []
    if threading.current_thread() is threading.main_thread():
        numbers = [number for number in _NUMBERS if signal.getsignal(number) not in (signal.SIG_IGN, _on_signal)]
    previous = {number: signal.signal(number, _on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if numbers:
            _asked = 0


@contextlib.contextmanager
def unit(what: str = "") -> Iterator[None]:
    """What is finished before a signal is obeyed. ``what`` it is goes into a line of the log; what has no name is so
    short that a second signal waits for it too."""
    with deferred(what):
        yield
    if _asked and not _units:
        _raise()


@contextlib.contextmanager
def deferred(what: str) -> Iterator[Callable[[], int]]:
    """A unit that looks itself at what is :func:`asked`, and ends early."""
    _units.append(what)
    try:
        yield asked
    finally:
        _units.pop()


def asked() -> int:
    """The number of the signal that asks for the run's end, or 0."""
    return _asked


def _raise() -> NoReturn:
    global _asked
    number, _asked = _asked, 0
    raise Interrupted(number)


def _on_signal(number: int, frame: Any) -> None:
    _ask(number)


def _ask(number: int) -> None:
    global _asked
    again, _asked = bool(_asked), number
    if not _units or (again and _units[-1]):
        for each in _NUMBERS:  # what cleans up is not disturbed
            if signal.getsignal(each) is _on_signal:
                signal.signal(each, signal.SIG_IGN)
        _raise()
    if _units[-1]:
        with contextlib.suppress(RuntimeError):  # the signal came within another line's writing
            logger.info("stopping after this %s (once more: at once)", _units[-1])


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Has standard output and error survive within the block: a reader that goes away asks for the run's end as a
    signal does; what cannot be written for other reasons, such as a full disk, is let go."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Guarded(stream) for stream in streams)
    try:
        yield
    finally:
        with contextlib.suppress(Interrupted):
            sys.stdout.flush()
        sys.stdout, sys.stderr = streams


class _Guarded:
    def __init__(self, stream: Any) -> None:
        self._stream, self._lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._lost:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._lost = True
        with contextlib.suppress(OSError, ValueError, AttributeError):  # or leaving Python would fail at it again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            return
        if threading.current_thread() is threading.main_thread():
            _ask(getattr(signal, "SIGPIPE", signal.SIGTERM))
        else:
            _thread.interrupt_main()
