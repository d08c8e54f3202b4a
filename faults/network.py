"""Every command without a network, and with names that are plainly paths: nothing is to be asked for."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import child
from .report import Report
from .scene import COMMANDS, READERS, SMALL, Scene

LIMIT = 40.0  # seconds for one command
ASKED = "asked"  # the file that an attempt leaves
PATHS = (
    *("./not/there", "not/there.safetensors", "../not/there", "~/not/there", "/not/there", "not/there/", "not//there"),
    *("not/there.ckpt", "C:\\not\\there", "not/./there", "file://not/there", "here/there"),
)


def run(report: Report, scale: float, seed: int) -> None:
    with Scene() as scene:
        trials: list[tuple[str, list[str], bool]] = [
            (name, scene.words(line), False) for name, line in (COMMANDS | READERS).items()
        ]
        for path in PATHS:
            trials.append(("a path as a model", ["generate", "-m", path, *SMALL.split(), "-p", "x", "-o", "out"], True))
            trials.append(
                ("a path as a Hyena file", [*scene.words("generate")[:3], "-p", "x", f"-y={path}", "-o", "out"], True)
            )
            trials.append(("a path to info", ["info", path], True))
        trials.append(
            (
                "demo",
                ["demo", "-o", "out", "-n", "1", "--n_images", "1", "--prompts", "1", "-s", "1", "--widths", "64"],
                False,
            )
        )
        for number in report.numbers(len(trials) * min(1, scale)):
            what, argv, refused = trials[number if scale >= 1 else report.random(number).randrange(len(trials))]
            folder = scene.folder(strangers=False)
            (folder / "here" / "there").mkdir(parents=True)
            ending = child.call(partial(blocked, child.command(argv), str(folder / ASKED)), LIMIT, 4 << 30, folder)
            wrong = child.judged(ending, limit=LIMIT, refused=refused)
            if not wrong and ending.status and not refused:
                wrong = f"fails without a network: {ending.stderr[-300:]}"
            if (folder / ASKED).exists():
                wrong = f"asked for {(folder / ASKED).read_text()[:100]}"
            report.verdict((18,), f"no network: {what}", wrong, report.again(number))
            shutil.rmtree(folder)


def blocked(work: Callable[[], int], note: str) -> int:
    """Libraries believe that there is a network; whoever tries it is noted and fails."""
    import huggingface_hub.constants

    def asked(*arguments: Any, **options: Any) -> Any:
        family = getattr(arguments[0], "family", None)
        if family == socket.AF_UNIX:
            raise OSError(101, "Network is unreachable")
        with Path(note).open("a") as file:
            print(arguments, file=file)
        raise OSError(101, "Network is unreachable")

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, asked)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        vars(socket)[name] = asked
    return work()
