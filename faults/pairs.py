"""Two commands in one folder, one after the other and both at once: the second is refused, or nothing of either is
lost."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

from . import hooks
from .judge import files_in, judge, losses, strays
from .report import Report
from .scene import COMMANDS, Scene, spread

SAME = ("benchmark sizes", "benchmark image", "train, stage 2")  # others of COMMANDS write as they do
WRITERS = [command for command in COMMANDS if command not in SAME]
WAIT = 60.0  # s that the second may take


def run(report: Report, scale: float, seed: int) -> None:
    trials = [(after, pair) for pair in itertools.product(WRITERS, repeat=2)]
    trials += [(meanwhile, pair) for pair in itertools.combinations_with_replacement(WRITERS, 2)]
    random.Random(seed).shuffle(trials)
    with Scene() as scene:
        for number in report.numbers(len(trials) * scale):
            way, pair = trials[number]
            draw = report.random(number)
            first, second = pair if way is after else draw.sample(pair, 2)
            detail = way(scene, first, second, draw)
            what = f"two commands in one folder, {'one after the other' if way is after else 'both at once'}"
            report.verdict((8, 12, 16), what, detail and f"{first}; {second}: {detail}", report.again(number))


def after(scene: Scene, first: str, second: str, draw: random.Random) -> str:
    """The second finds all that the first has made."""
    folder = scene.folder(strangers=False)
    shutil.rmtree(folder)
    shutil.copytree(scene.undisturbed(first).folder, folder)
    before = files_in(folder)
    ending = scene.run(second, folder)
    told = ending.status, ending.stdout, ending.stderr, ending.seconds
    wrong = judge(*told, before, files_in(folder), limit=120, writes=("logs/*", "*lock*"))
    if not wrong and ending.status == 0:
        wrong = scene.undisturbed(second).holds(folder)
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
    stopped = files_in(folder)
    other = "-k 99" if first == second in ("generate", "evaluate") else ""
    ending = scene.start(second, folder, other).wait(WAIT)
    made = {path: what for path, what in files_in(folder).items() if path not in stopped and "logs/" not in path}
    held.send(signal.SIGCONT)
    wrong = ""
    for command, each in ((first, held.wait()), (second, ending)):
        told = each.status, each.stdout, each.stderr, each.seconds
        bad = judge(*told, limit=120) or (
            scene.undisturbed(command).holds(folder) if each.status == 0 and not other else ""
        )
        wrong = wrong or (bad and f"{command}: {bad}")
    there = files_in(folder)
    wrong = wrong or losses(before, there) or losses(made, there) or strays(before, there)
    shutil.rmtree(folder)
    return wrong and f"stopped at {writes[number - 1]}: {wrong}"


def _until_stopped(pid: int) -> None:
    """Returns when a process is stopped, or has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX":
            time.sleep(0.02)
