"""Commands as processes, in tenths of a second each: forked from one that has imported everything.

``run(["train", "-n", "4"], cwd=folder)`` is ``cd folder; sd-hyena train -n 4``: a process of its own, in a session of
its own, with what Python does at its end. What happens to it meanwhile is a hook (see :mod:`.hooks`), called in the
child before the command, or :meth:`Command.send`.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Hook = Callable[[], None]


@dataclass(frozen=True)
class Ending:
    """How a command ended: ``status`` is the exit status, or minus the signal that killed it; None: it hung, and was
    killed at its time limit."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


class Command:
    """A command that runs. ``stdout`` may be a pipe's path."""

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path | str,
        *,
        env: Mapping[str, str] | None = None,
        hooks: Sequence[Hook] = (),
        entry: Callable[[list[str]], int] | None = None,
        stdout: Path | str = "",
    ) -> None:
        self._texts = Path(tempfile.mkdtemp(prefix="faults-"))
        self.out, self.err = Path(stdout or self._texts / "out"), self._texts / "err"
        self._began = time.monotonic()
        arguments = (list(argv), str(cwd), dict(env or {}), list(hooks), entry, str(self.out), str(self.err))
        self._process = _forkserver().Process(target=_child, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid or 0

    def send(self, number: int) -> None:
        """A signal to the command, if it still runs."""
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def runs(self) -> bool:
        return self._process.exitcode is None

    def stderr(self) -> str:
        """What it has said so far."""
        return self.err.read_text(errors="replace") if self.err.exists() else ""

    def wait(self, timeout: float = 120.0) -> Ending:
        """Its ending; past ``timeout`` (s from the start) it is killed, with what it started."""
        self._process.join(max(0.0, timeout - (time.monotonic() - self._began)))
        status = self._process.exitcode
        seconds = time.monotonic() - self._began
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        texts = [p.read_text(errors="replace") if p.is_file() else "" for p in (self.out, self.err)]
        for path in (self._texts / "out", self.err):
            path.unlink(missing_ok=True)
        self._texts.rmdir()
        return Ending(status, texts[0], texts[1], seconds)


def run(argv: Sequence[str], cwd: Path | str, *, timeout: float = 120.0, **options: object) -> Ending:
    """Runs one command to its end; ``options`` are those of :class:`Command`."""
    return Command(argv, cwd, **options).wait(timeout)  # type: ignore[arg-type]


def started() -> bool:
    """Whether the process that commands are forked from is there."""
    return forkserver._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]


def _forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))
    # A killed command's semaphores are nobody's news.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    context.set_forkserver_preload(["faults.warm"])
    return context


def _child(
    argv: list[str],
    cwd: str,
    env: dict[str, str],
    hooks: list[Hook],
    entry: Callable[[list[str]], int] | None,
    out: str,
    err: str,
) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(err, flags, 0o644), 2)
    os.dup2(os.open(out, flags, 0o644), 1)
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding="utf-8")  # noqa: SIM115 - they are the process's own
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    os.environ.update(env)
    os.chdir(cwd)
    if entry is None:
        from sd_hyena.cli import main as entry
    for hook in hooks:
        hook()
    assert entry is not None
    os._exit(_end(_status(entry, argv)))


def _status(entry: Callable[[list[str]], int], argv: list[str]) -> int:
    """The exit status that Python makes of what the command returns or raises."""
    try:
        return entry(argv) or 0
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BaseException:
        traceback.print_exc()
        return 1


def _end(status: int) -> int:
    """What Python does at the end: waits for threads, calls who asked for it, flushes."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        print("Exception ignored in: <stdout>", file=sys.stderr)
        traceback.print_exc()
        status = 120
    return status
