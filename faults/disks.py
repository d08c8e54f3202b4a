"""A disk that fills up at every write of every command, and one that is full for what it prints: one line that names
the file, what was there intact, and with room again the command ends as ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import hooks, zygote
from .judge import files_in, judge, losses, strays
from .report import Report
from .scene import COMMANDS, READERS, Scene, distinct

ALIKE = ("benchmark sizes", "benchmark image")  # they write as "benchmark layer" does: a few places will do
AGAIN = 3  # of as many trials, one goes on once there is room again
PLACES = 30  # more writes, each of its own kind, than any command has
SIZE = 64 << 20  # bytes of the small disk
LEFT = (0, 4096, 0, 16384)  # bytes that are still free on it, in turn: a write fails at once, or in its middle
LENGTH = (1024, 4096)  # bytes, where a limit on files stands for it: what is said goes into a file too
NEW_NAMESPACES = 0x10000000 | 0x00020000  # of users and of mounts: what is mounted is seen here alone
CANNOT = ("cannot write", "No space left", "File too large")


def run(report: Report, scale: float, seed: int) -> None:
    mounts = _own_mounts()
    with Scene() as scene, _small_disk(scene.root / "disk", mounts) as disk:
        if not disk:
            report.skip("a full file system", "no tmpfs can be mounted here: files cannot grow instead (RLIMIT_FSIZE)")
        trials = [(command, place) for command in COMMANDS for place in range(0, PLACES, 6 if command in ALIKE else 1)]
        trials += [(command, -1) for command in (*COMMANDS, *READERS)]
        random.Random(seed).shuffle(trials)
        for number in report.numbers(len(trials) * scale):
            command, place = trials[number]
            if place < 0:
                detail, what = full_output(scene, command), "what it prints goes to a full disk"
            elif place >= len(distinct(scene.undisturbed(command).writes)):
                continue
            else:
                detail, what = trial(scene, command, place, disk), "the disk fills up at a write"
            report.verdict((7,), f"{what}: {command}", detail, report.again(number))


def trial(scene: Scene, command: str, place: int, disk: Path | None) -> str:
    """The disk is full from one write on; then there is room again."""
    undisturbed, folder = scene.undisturbed(command), scene.folder(under=disk)
    kinds = distinct(undisturbed.writes)
    number, before = kinds[place % len(kinds)], files_in(folder)
    full = partial(hooks.fill, LEFT[place % 4]) if disk else partial(hooks.limit, LENGTH[place % 2])
    ending = scene.run(command, folder, hooks=[hooks.at_write(number, full)])
    there = files_in(folder)
    there.pop("ballast", None)
    told = ending.status, ending.stdout, ending.stderr, ending.seconds
    wrong = judge(*told, before, there, allowed=(0, 1), limit=120, names=CANNOT)
    if not wrong and ending.status == 0:
        wrong = undisturbed.lacks(folder)
    elif not wrong and str(folder.name) not in ending.stderr and "out" not in ending.stderr:
        wrong = f"no file is named: {ending.stderr}"
    (folder / "ballast").unlink(missing_ok=True)
    if not wrong and place % AGAIN == 0:
        ending = scene.go_on(command, folder)
        after = files_in(folder)
        wrong = judge(ending.status, ending.stdout, ending.stderr, ending.seconds, allowed=(0,), limit=120)
        wrong = wrong or losses(before, after) or strays(before, after) or undisturbed.lacks(folder)
        wrong = wrong and f"with room again: {wrong}"
    shutil.rmtree(folder)
    return wrong and f"at {undisturbed.writes[number - 1]}: {wrong}"


def full_output(scene: Scene, command: str) -> str:
    """``command > /dev/full``: what it makes is made, or it says why not."""
    folder = scene.folder()
    before = files_in(folder)
    ending = scene.run(command, folder, stdout="/dev/full")
    told = ending.status, ending.stdout, ending.stderr, ending.seconds
    wrong = judge(*told, before, files_in(folder), allowed=(0, 1), limit=120)
    if not wrong and ending.status == 0 and command in COMMANDS:
        wrong = scene.undisturbed(command).lacks(folder)
    shutil.rmtree(folder)
    return wrong


def _own_mounts() -> bool:
    """Moves this process to where it may mount, before it has others, which stay where they are; whether it did."""
    if zygote.started():
        return False
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(NEW_NAMESPACES):
        return False
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return True
    return False


@contextlib.contextmanager
def _small_disk(place: Path, permitted: bool) -> Iterator[Path | None]:
    """A file system of SIZE bytes, or None."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)]
    if not permitted or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)
