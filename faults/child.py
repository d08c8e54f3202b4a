"""One trial in a process of its own, which may hang, crash or use up its memory: a fork of this one, so that work may
be any function, on objects that are there already. (See :mod:`.zygote` for whole commands.)"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import warm  # noqa: F401 - what every trial would import again
from .judge import judge
from .zygote import Ending

MEMORY = 1 << 30  # bytes that a trial may have beside what it starts with
PATIENCE = 10  # times as long as it computes, for a machine that others use too
REACHED = 77  # exit status of a request that was taken: what follows would load a model


def call(work: Callable[[], int | None], limit: float = 30.0, memory: int = MEMORY, cwd: Path | None = None) -> Ending:
    """Runs ``work`` in a child of this process; its result is the exit status. ``limit``: seconds of computing; it is
    killed after as many times PATIENCE. The ending has its seconds of computing, which others on the machine do not
    change."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if not pid:
            _be_a_child(work, stdout.fileno(), stderr.fileno(), limit, memory, cwd)
        handle = os.pidfd_open(pid)
        try:
            in_time = bool(select.select([handle], [], [], limit * PATIENCE)[0])
        finally:
            os.close(handle)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, code, used = os.wait4(pid, 0)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read(1 << 22).decode(errors="backslashreplace"))
    computed = used.ru_utime + used.ru_stime
    in_time &= computed <= limit
    return Ending(os.waitstatus_to_exitcode(code) if in_time else None, texts[0], texts[1], computed)


def _be_a_child(
    work: Callable[[], int | None], stdout: int, stderr: int, limit: float, memory: int, cwd: Path | None
) -> None:
    status: Any = 1
    try:
        os.setpgid(0, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - they are the child's own
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if cwd:
            os.chdir(cwd)
        status = work()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def command(argv: Sequence[str], load: bool = True, pipe: Any = None) -> Callable[[], int]:
    """The work of one command line. Unless ``load``, it ends with REACHED where a model's weights would be read;
    ``pipe`` is what reading them gives."""

    def work() -> int:
        from sd_hyena import models
        from sd_hyena.cli import main
        from sd_hyena.distill import trainer
        from sd_hyena.models import layers

        vars(trainer)["VALIDATION_SAMPLES"] = 2  # which have many batches where a batch is one picture
        if pipe is not None:
            vars(models)["load_pipeline"] = lambda *args, **options: pipe
        elif not load:
            for module, name in ((models, "load_pipeline"), (layers, "read_layers")):
                setattr(module, name, _reached)
        return main([*argv])

    return work


def say() -> None:
    """What the product logs goes to standard error as the command line writes it."""
    from sd_hyena.cli import Lines

    handler = logging.StreamHandler()
    handler.setFormatter(Lines("sd-hyena: %(message)s"))
    logging.getLogger("sd_hyena").addHandler(handler)


def judged(ending: Ending, **options: Any) -> str:
    """What is wrong with an ending; ``options`` are those of :func:`faults.judge.judge`."""
    options = {"allowed": (0, 1, 2, REACHED)} | options
    return judge(ending.status, ending.stdout, ending.stderr, ending.seconds, **options)


def _reached(*args: Any, **options: Any) -> None:
    raise SystemExit(REACHED)
