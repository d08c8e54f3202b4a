"""One trial in a forked process of its own: it may hang, crash or use up its memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEMORY = 1 << 30  # bytes that a trial may have beside what it starts with
REACHED = 77  # exit status of a request that was taken: what follows would load a model


class Ending(NamedTuple):
    """How a trial ended. ``status``: None if it was killed after its time, negative if a signal ended it."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


@functools.cache
def preload() -> None:
    """Imports once what every command would import again."""
    from sd_hyena.cli import COMMANDS
    from sd_hyena.models.quiet import quiet_libraries

    quiet_libraries()
    for name in COMMANDS:
        importlib.import_module(f"sd_hyena.cli.{name}")
    for name in ("diffusers", "transformers", "accelerate", "torch.utils.tensorboard", "matplotlib.pyplot"):
        importlib.import_module(name)
    from diffusers import StableDiffusionPipeline  # noqa: F401 - it is imported when it is asked for
    from PIL import Image

    Image.init()


def call(work: Callable[[], int | None], limit: float = 30.0, memory: int = MEMORY, cwd: Path | None = None) -> Ending:
    """Runs ``work`` in a child of this process for ``limit`` seconds at most; its result is the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            _be_a_child(work, stdout.fileno(), stderr.fileno(), memory, cwd)
        handle = os.pidfd_open(pid)
        try:
            in_time = bool(select.select([handle], [], [], limit)[0])
        finally:
            os.close(handle)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.monotonic() - start
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read(1 << 22).decode(errors="backslashreplace"))
    return Ending(code if in_time else None, *texts, seconds)


def _be_a_child(work: Callable[[], int | None], stdout: int, stderr: int, memory: int, cwd: Path | None) -> None:
    status: Any = 1
    try:
        os.setpgid(0, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
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


def command(argv: Sequence[str], load: bool = True) -> Callable[[], int]:
    """The work of one command line. Unless ``load``, it ends with REACHED where a model's weights would be read."""

    def work() -> int:
        from sd_hyena import models
        from sd_hyena.cli import main
        from sd_hyena.models import layers

        if not load:
            for module, name in ((models, "load_pipeline"), (layers, "read_layers")):
                setattr(module, name, _reached)
        return main([*argv])

    return work


def _reached(*args: Any, **options: Any) -> None:
    raise SystemExit(REACHED)
