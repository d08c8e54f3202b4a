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
from .scene import Scene, results_in, spread

COMMANDS = ("train", "train, stage 2", "prepare", "generate", "evaluate")
EACH = 30
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
REWRITTEN = (".safetensors", "manifest.json")  # there earlier, with less in it


def run(report: Report, scale: float, seed: int) -> None:
    with Scene() as scene:
        for number in report.numbers(EACH * len(COMMANDS) * scale):
            command, place = COMMANDS[number % len(COMMANDS)], number // len(COMMANDS)
            points = (6, 8, 9, 11) if command.startswith("train") else (6, 8)
            detail = trial(scene, command, place, report.random(number))
            report.verdict(points, f"SIGKILL, then the same again: {command}", detail, report.again(number))


def trial(scene: Scene, command: str, place: int, draw: random.Random) -> str:
    """One kill: of three, one before a write, one in the middle of one, one at some time."""
    undisturbed = scene.undisturbed(command)
    number = spread(place, len(undisturbed.writes))
    folder = scene.folder(strangers=bool(place % 2))
    before = files_in(folder)
    if place % 3 == 0:
        ending = scene.run(command, folder, hooks=[hooks.at_write(number, hooks.kill)])
    elif place % 3 == 1:
        middle = hooks.at_write(number, partial(hooks.limit, draw.choice([0, 1, 100, 1000])))
        ending = scene.run(command, folder, hooks=[hooks.dies_at_limit, middle])
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
    for path, held in results_in(folder).items():
        if undisturbed.exact.get(path, held) != held and not path.endswith(REWRITTEN):
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
