"""Signals, and a reader that goes away: the work in hand is finished, what is kept is said, and a second signal ends
the command at once."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path

from . import hooks, zygote
from .judge import files_in, judge, losses, strays
from .report import Report
from .scene import COMMANDS, GOES_ON, READERS, Scene, results_in, spread
from .zygote import Ending

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAYS = (*(number.name for number in SIGNALS), "a second signal", "a reader that goes away", "nohup")
SAID = re.compile(r"stopp|kept|saved|nothing|interrupt|ended", re.IGNORECASE)
AT_ONCE = 30.0  # s more than an undisturbed run may take, on a busy machine


def run(report: Report, scale: float, seed: int) -> None:
    every = [*COMMANDS, *READERS]
    trials = [(command, way, 0) for way in WAYS for command in every]
    trials += [(command, way, 1) for way in WAYS for command in (*GOES_ON, "generate", "evaluate")]
    random.Random(seed).shuffle(trials)
    with Scene() as scene:
        for number in report.numbers(len(trials) * scale):
            command, way, place = trials[number]
            detail = trial(scene, command, way, place, report.random(number))
            report.verdict((10, 8), f"{way}: {command}", detail, report.again(number))


def trial(scene: Scene, command: str, way: str, place: int, draw: random.Random) -> str:
    """One command that is asked to end: at a write of its, or, in the second round and if it has none, at a file
    that it opens."""
    undisturbed, folder = scene.undisturbed(command), scene.folder()
    writes, before = len(undisturbed.writes), files_in(folder)
    moment = draw.randrange(1000)
    if place == 0 and writes:
        at, count = hooks.at_write, writes
    else:
        at, count = hooks.at_open, undisturbed.opens
    first = spread(moment, count)
    number: int = signal.SIGTERM
    again: list[zygote.Hook] = []
    if way in signal.Signals.__members__:
        number = signal.Signals[way]
    elif way == "a second signal":
        number = draw.choice(SIGNALS)
        again = [at(first + 1, partial(hooks.send, draw.choice(SIGNALS)))]
    if way == "a reader that goes away":
        ending, number = _with_reader(scene, command, folder, draw.randrange(4)), signal.SIGPIPE
    elif way == "nohup":
        hung_up = at(first, partial(hooks.send, signal.SIGHUP))
        ending, number = scene.run(command, folder, hooks=[_ignore_hang_up, hung_up]), 0
    else:
        ending = scene.run(command, folder, hooks=[at(first, partial(hooks.send, number)), *again])
    wrong = _wrong(scene, command, folder, before, ending, number, way)
    shutil.rmtree(folder)
    return wrong and f"{at.__name__} {first} of {count}: {wrong}"


def _wrong(
    scene: Scene, command: str, folder: Path, before: dict[str, str], ending: Ending, number: int, way: str
) -> str:
    undisturbed, there = scene.undisturbed(command), files_in(folder)
    twice = way == "a second signal"
    statuses = {0} if not number else {128 + each for each in SIGNALS} if twice else {128 + number, 0}
    limit = undisturbed.seconds * 3 + AT_ONCE
    wrong = judge(
        ending.status, ending.stdout, ending.stderr, ending.seconds, before, there, allowed=statuses, limit=limit
    )
    if wrong:
        return wrong
    if ending.status == 0:  # it was done already
        return undisturbed.lacks(folder)
    if number != signal.SIGPIPE and not SAID.search(ending.stderr + ending.stdout):
        return f"silent: not a word of what is kept: {ending.stdout[-200:]} {ending.stderr[-200:]}"
    for path, held in results_in(folder).items():
        if undisturbed.exact.get(path, held) != held and not path.endswith((".safetensors", "manifest.json")):
            return f"half written: {path}"
    if command not in GOES_ON and command != "generate":
        return ""
    ending = scene.go_on(command, folder)
    after = files_in(folder)
    wrong = judge(ending.status, ending.stdout, ending.stderr, ending.seconds, allowed=(0,), limit=120)
    wrong = wrong or losses(before, after) or strays(before, after) or undisturbed.lacks(folder)
    return wrong and f"going on: {wrong}"


def _with_reader(scene: Scene, command: str, folder: Path, lines: int) -> Ending:
    """``command | head -n lines``."""
    pipe = folder.with_suffix(".pipe")
    os.mkfifo(pipe)
    started = scene.start(command, folder, stdout=pipe)
    with open(pipe, errors="replace") as reader:
        for _ in range(lines):
            reader.readline()
    ending = started.wait()
    pipe.unlink()
    return ending


def _ignore_hang_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
