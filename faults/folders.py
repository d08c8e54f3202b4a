"""Folders that cannot be written to, that vanish, and in which somebody's files have the very names: one line, and
nobody's file is touched."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from functools import partial
from pathlib import Path

from . import hooks
from .judge import files_in, judge
from .report import Report
from .scene import COMMANDS, Scene, results_in, spread

CAPABILITIES, DAC_OVERRIDE = 0x20080522, 1  # of linux/capability.h
WAYS = {
    "the folder is read-only": (7,),
    "the folder cannot be made": (7,),
    "the folder is a file": (7, 16),
    "the folder vanishes": (7,),
    "somebody's files have the names": (8, 16),
}


def run(report: Report, scale: float, seed: int) -> None:
    trials = [(command, way, 0) for way in WAYS for command in COMMANDS]
    trials += [(command, "the folder vanishes", place) for place in (1, 2) for command in COMMANDS]
    random.Random(seed).shuffle(trials)
    with Scene() as scene:
        for number in report.numbers(len(trials) * scale):
            command, way, place = trials[number]
            detail = trial(scene, command, way, place, report.random(number))
            report.verdict(WAYS[way], f"{way}: {command}", detail, report.again(number))


def trial(scene: Scene, command: str, way: str, place: int, draw: random.Random) -> str:
    folder = scene.folder(strangers=way not in ("the folder cannot be made", "the folder is a file"))
    allowed, acts = {1, 2}, []
    if way == "somebody's files have the names":
        undisturbed = scene.undisturbed(command)
        for path in [*undisturbed.exact, *undisturbed.others]:
            if not (undisturbed.folder / path).is_dir():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(f"mine: {path}")
        allowed = {0, 1, 2}  # what never replaces a file may take another name
    elif way == "the folder is a file":
        (folder / "out").write_text("mine")
    elif way == "the folder vanishes":
        undisturbed = scene.undisturbed(command)
        number = spread(draw.randrange(1000) * 3 + place, len(undisturbed.writes))
        acts, allowed = [hooks.at_write(number, partial(hooks.vanish, "out"))], {0, 1, 2}
    else:
        os.chmod(folder / "out" if (folder / "out").exists() else folder, 0o555)
        acts = [obey_modes]
    before = files_in(folder)
    ending = scene.run(command, folder, hooks=acts)
    there = files_in(folder)
    if way == "the folder vanishes":  # what is in it has moved with it
        for path in [path for path in there if path.startswith("out-away")]:
            moved = path.replace("out-away", "out", 1)
            there.setdefault(moved, there[path])
    told = ending.status, ending.stdout, ending.stderr, ending.seconds
    wrong = judge(*told, before, there, allowed=allowed, limit=120, names=["out"], stray=way == "the folder vanishes")
    if not wrong and ending.status == 0 and way == "the folder vanishes":
        wrong = _lacks(scene, command, folder)
    for each in (folder / "out", folder):
        if each.is_dir():
            os.chmod(each, 0o755)
    shutil.rmtree(folder)
    return wrong


def _lacks(scene: Scene, command: str, folder: Path) -> str:
    """Results that a run said to have made, and that are in neither of the two folders."""
    there = {path.replace("out-away", "out", 1) for path in results_in(folder)}
    missing = [path for path in scene.undisturbed(command).exact if path not in there]
    return f"exit status 0, but {missing[0]} is missing" if missing else ""


def obey_modes() -> None:
    """Modes hold for the command even if it runs as root."""
    if os.geteuid():
        return
    library, header, held = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if library.capget(header, held):
        raise OSError("capget")
    held[0] &= ~(1 << DAC_OVERRIDE)
    if library.capset(header, held):
        raise OSError("capset")
