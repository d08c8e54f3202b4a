"""What can happen to a command at its n-th write; called in the child (see :mod:`.zygote`).

A write is every opening for writing, flush to disk, renaming, removal or making of a file or folder under the working
folder: what is on disk changes there and nowhere else, so "before the n-th" for all n is every moment that matters.
What is half written is tried with :func:`dies_at_limit`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Action = Callable[[], None]
CHANGES = {"os.rename": 2, "os.link": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.chmod": 1, "os.truncate": 1}


def at_write(number: int, action: Action, log: str = "") -> Action:
    """A hook: ``action`` happens just before the ``number``-th write (from 1). ``log`` lists the writes, one a line."""
    return partial(_watch, number, action, log)


def at_open(number: int, action: Action, log: str = "") -> Action:
    """The same, before it opens the ``number``-th file, whichever it is and for whatever."""
    return partial(_watch, number, action, log, opens=True)


def _watch(number: int, action: Action, log: str, opens: bool = False) -> None:
    inside, seen, busy = "/" if opens else os.getcwd() + os.sep, 0, False
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else -1

    def happened(what: str, *paths: Any) -> None:
        nonlocal seen, busy
        names = [os.path.abspath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        if busy or not any(name.startswith(inside) for name in names):
            return
        seen += 1
        busy = True  # what the action itself writes does not count
        try:
            if log:
                os.write(lines, f"{what} {' '.join(name.removeprefix(inside) for name in names)}\n".encode())
            if seen == number:
                action()
        finally:
            busy = False

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if opens or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                happened("open", path)
        elif event in CHANGES and not opens:
            happened(event, *args[: CHANGES[event]])

    if opens:
        sys.addaudithook(audit)
        return
    flush = os.fsync

    def fsync(file: Any) -> None:
        happened("fsync", os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        flush(file)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def nothing() -> None:
    """Happens."""


def send(*numbers: int) -> None:
    """Signals to the command itself; SIGSTOP leaves it there until SIGCONT."""
    for number in numbers:
        os.kill(os.getpid(), number)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit(size: int) -> None:
    """From here on no file can grow beyond ``size`` bytes: "File too large", or see :func:`dies_at_limit`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def dies_at_limit() -> None:
    """A hook: the write that passes a :func:`limit` ends the command, in its middle."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def fill(left: int, ballast: str = "ballast") -> None:
    """Fills the file system of the working folder until ``left`` bytes are free."""
    free = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - left))


def vanish(folder: str) -> None:
    """The folder is moved away, as by someone else."""
    if Path(folder).is_dir():
        os.rename(folder, f"{folder}-away")
