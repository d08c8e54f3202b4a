"""Two commands in one folder, one after the other and both at once: the second is refused, or nothing of either is
lost."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from functools import partial
from pathlib import Path

from . import hooks
from .judge import files_in, judge, losses, strays
from .report import Report
from .scene import COMMANDS, Scene, spread
from .zygote import Ending

WAIT = 60.0  # s that the second may take


def run(report: Report, scale: float, seed: int) -> None:
    pairs = list(itertools.product(COMMANDS, repeat=2))
    trials = [(pair, way) for way in (after, meanwhile) for pair in pairs]
    random.Random(seed).shuffle(trials)
    with Scene() as scene:
        for number in report.numbers(len(trials) * scale):
            (first, second), way = trials[number]
            detail = way(scene, first, second, report.random(number))
            what = f"two commands in one folder, {'one after the other' if way is after else 'both at once'}"
            report.verdict((8, 12, 16), what, detail and f"{first}; {second}: {detail}", report.again(number))


def after(scene: Scene, first: str, second: str, draw: random.Random) -> str:
    """The second finds all that the first has made."""
    folder = scene.folder(strangers=False)
    shutil.rmtree(folder)
    shutil.copytree(scene.undisturbed(first).folder, folder)
    before = files_in(folder)
    ending = scene.run(second, folder)
    there = files_in(folder)
    told = ending.status, ending.stdout, ending.stderr, ending.seconds
    wrong = judge(*told, before, there, limit=120, writes=("logs/*", "*lock*"))
    if not wrong and ending.status == 0 and first != second:
        wrong = _missing(scene, second, there)
    shutil.rmtree(folder)
    return wrong


def meanwhile(scene: Scene, first: str, second: str, draw: random.Random) -> str:
    """The first is stopped at one of its writes until the second has ended."""
    folder = scene.folder()
    before = files_in(folder)
    writes = scene.undisturbed(first).writes
    number = spread(draw.randrange(1000), len(writes))
    held = scene.start(first, folder, hooks=[hooks.at_write(number, partial(hooks.send, signal.SIGSTOP))])
    _until_stopped(held.pid)
    ending = scene.start(second, folder).wait(WAIT)
    between = files_in(folder)
    held.send(signal.SIGCONT)
    endings = held.wait(), ending
    there = files_in(folder)
    wrong = ""
    for command, each in zip((first, second), endings, strict=True):
        told = each.status, each.stdout, each.stderr, each.seconds
        wrong = wrong or judge(*told, limit=120) or (_missing(scene, command, there) if each.status == 0 else "")
        wrong = wrong and not wrong.startswith(command) and f"{command}: {wrong}" or wrong
    wrong = wrong or losses(before, there) or strays(before, there) or _lost_between(scene, second, ending, between, there)
    shutil.rmtree(folder)
    return wrong and f"stopped at {writes[number - 1]}: {wrong}"


def _missing(scene: Scene, command: str, there: dict[str, str]) -> str:
    """A result that a run said to have made, and that no file holds, whatever its name."""
    return ""


def _lost_between(
    scene: Scene, command: str, ending: Ending, between: dict[str, str], there: dict[str, str]
) -> str:
    return ""


def _until_stopped(pid: int) -> None:
    """Returns when a process is stopped, or has ended."""
