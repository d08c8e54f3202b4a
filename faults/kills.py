"""SIGKILL at any write, between them and in the middle of one: what is whole loads, and the same command goes on to
the same result, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

from . import hooks
from .judge import files_in, judge, losses, strays
from .report import Report
from .scene import Scene, spread

COMMANDS = ("train", "train, stage 2", "prepare", "generate", "evaluate")
EACH = 30
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


def run(report: Report, scale: float, seed: int) -> None:
    with Scene() as scene:
        trials = [(command, i) for command in COMMANDS for i in range(max(1, round(EACH * scale)))]
        for number in report.numbers(len(trials)):
            command, place = trials[number]
            draw = report.random(number)
            points = (6, 8, 9, 11) if command.startswith("train") else (6, 8)
            what = f"SIGKILL in {command}, then the same again"
            report.verdict(points, what, trial(scene, command, place, len(trials) // len(COMMANDS), draw), report.again(number))


def trial(scene: Scene, command: str, place: int, count: int, draw: random.Random) -> str:
    """One kill: of three, one before a write, one in the middle of one, one at some time. The places are spread
    evenly."""
    undisturbed = scene.undisturbed(command)
    writes = spread(count, len(undisturbed.writes))
    number = writes[min(place, len(writes) - 1)]
    folder = scene.folder(strangers=bool(place % 2))
    before = files_in(folder)
    if place % 3 == 0:
        ending = scene.run(command, folder, hooks=[hooks.at_write(number, hooks.kill)])
    elif place % 3 == 1:
        middle = partial(hooks.break_off, draw.choice([0, 1, 100, 1000]))
        ending = scene.run(command, folder, hooks=[hooks.at_write(number, middle)])
    else:
        started = scene.start(command, folder)
        time.sleep(draw.uniform(0.1, 1) * undisturbed.seconds)
        started.send(signal.SIGKILL)
        ending = started.wait()
    if ending.status not in (*KILLED, 0):
        return f"ended with {ending.status}: {ending.stderr[-300:]}"
    return wrong_after(scene, command, folder, before) or _removed(folder)


def wrong_after(scene: Scene, command: str, folder: Path, before: dict[str, str]) -> str:
    """What is wrong with the folder of a command that was killed, and with what goes on there; "" if nothing is."""
    undisturbed, there = scene.undisturbed(command), files_in(folder)
    lost = losses(before, there)
    if lost:
        return f"the kill: {lost}"
    for path, held in there.items():
        if path not in before and undisturbed.exact.get(path, held) != held and not path.endswith("manifest.json"):
            return f"the kill left {path} half written"
    newest = max((p for p in there if p.startswith("out/Hyena-") and p not in before), default="")
    if newest and scene.run(f"info {newest}", folder).status:
        return f"the newest file, {newest}, does not load"
    ending = scene.go_on(command, folder)
    after = files_in(folder)
    wrong = judge(ending.status, ending.stdout, ending.stderr, ending.seconds, allowed=(0,), limit=120)
    wrong = wrong or losses(before, after) or strays(before, after) or undisturbed.lacks(folder)
    return wrong and f"going on: {wrong}"


def _removed(folder: Path) -> str:
    shutil.rmtree(folder)
    return ""
