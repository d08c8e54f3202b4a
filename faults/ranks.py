"""Two processes: if one is killed, the other ends in seconds with a line, the last save intact; mistakes are told
once; work that is shared is done once and whole."""

from __future__ import annotations

import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from . import hooks
from .judge import files_in, judge, losses, strays, words
from .report import Report
from .scene import GOES_ON, Scene, results_in, spread
from .zygote import Ending, Hook

Way = Callable[[Scene, str, int, random.Random], str]
SHARED = (*GOES_ON, "generate")
SOON, LIMIT = 40.0, 60.0  # s that the other may take, and both together, on a busy machine


def run(report: Report, scale: float, seed: int) -> None:
    trials: list[tuple[Way, str, int]] = [
        (killed, command, rank) for _ in range(2) for command in SHARED for rank in (0, 1)
    ]
    trials += [(undisturbed, command, 0) for command in SHARED]
    trials += [(mistaken, command, 0) for command in SHARED]
    trials += [(other_number, command, count) for command in ("train", "train, stage 2") for count in (1, 2)]
    random.Random(seed).shuffle(trials)
    with Scene() as scene:
        for number in report.numbers(len(trials) * scale):
            way, command, which = trials[number]
            detail = way(scene, command, which, report.random(number))
            report.verdict(POINTS[way], f"two processes, {NAMES[way]}: {command}", detail, report.again(number))


def together(
    scene: Scene, command: str, folder: Path, more: str = "", hooks_of: dict[int, list[Hook]] | None = None
) -> list[Ending]:
    """The command in two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        scene.start(
            command,
            folder,
            more,
            env=scene.env | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            hooks=[_meet_soon, *(hooks_of or {}).get(rank, [])],
        )
        for rank in range(2)
    ]
    return [each.wait(LIMIT) for each in started]


def _meet_soon() -> None:
    """One that is killed before they have met is not waited for as long as in earnest."""
    from sd_hyena import processes

    processes.MEETING = SOON / 3


def killed(scene: Scene, command: str, rank: int, draw: random.Random) -> str:
    """One is killed once they have met: the first at a write, the second at one of the last files that it opens. The
    other ends soon, and both together go on."""
    folder, known = scene.folder(), scene.undisturbed(command)
    before, moment = files_in(folder), draw.randrange(1000)
    if rank == 0:
        at = hooks.at_write(spread(moment, len(known.writes)), hooks.kill)
    else:
        at = hooks.at_open(known.opens // 2 + spread(moment, known.opens // 2), hooks.kill)
    endings = together(scene, command, folder, hooks_of={rank: [at]})
    dead, other = endings[rank], endings[1 - rank]
    wrong = judge(other.status, other.stdout, other.stderr, other.seconds, allowed=(0, 1), limit=SOON, stray=True)
    wrong = wrong or losses(before, files_in(folder))
    if not wrong and dead.status == -signal.SIGKILL:
        wrong = _finished(scene, command, folder, before, GOES_ON.get(command, "--overwrite"))
    shutil.rmtree(folder)
    return wrong and f"process {rank}, killed, {dead.status}: {wrong}"


def undisturbed(scene: Scene, command: str, _: int, draw: random.Random) -> str:
    """Both end well, and no file is missing."""
    folder = scene.folder()
    wrong = _finished(scene, command, folder, files_in(folder), "")
    shutil.rmtree(folder)
    return wrong


def mistaken(scene: Scene, command: str, _: int, draw: random.Random) -> str:
    """A mistake of the user's is one line, not one per process."""
    folder = scene.folder()
    before = files_in(folder)
    more = draw.choice(["--device nothing", "-o {hyena}", "-b 0" if command != "generate" else "-n 0", "-d -7x"])
    endings = together(scene, command, folder, more)
    said = "".join(each.stderr for each in endings)
    wrong = losses(before, files_in(folder)) or words("", said, failed=True)
    if {each.status for each in endings} != {2}:
        wrong = f"exit statuses {[each.status for each in endings]}, not 2: {said[-300:]}"
    elif len(said.splitlines()) != 1:
        wrong = f"{len(said.splitlines())} lines: {said[:300]}"
    shutil.rmtree(folder)
    return wrong and f"{more}: {wrong}"


def other_number(scene: Scene, command: str, count: int, draw: random.Random) -> str:
    """A run of ``count`` processes that was killed is resumed with the other number: refused."""
    folder, writes = scene.folder(), scene.undisturbed(command).writes
    at = [hooks.at_write(spread(draw.randrange(1000), len(writes) // 2) + len(writes) // 2, hooks.kill)]
    if count == 1:
        scene.run(command, folder, hooks=at)
        endings = together(scene, command, folder, "--resume")
    else:
        together(scene, command, folder, hooks_of={0: at})
        endings = [scene.run(command, folder, "--resume")]
    wrong = ""
    for each in endings:
        if not wrong and each.status != 2:
            wrong = f"exit status {each.status}, not 2: {each.stderr[-300:]}"
    shutil.rmtree(folder)
    return wrong


def _finished(scene: Scene, command: str, folder: Path, before: dict[str, str], more: str) -> str:
    """What is wrong after both have done the whole, once more or for the first time."""
    endings = together(scene, command, folder, more)
    for each in endings:
        wrong = judge(each.status, each.stdout, each.stderr, each.seconds, allowed=(0,), limit=120)
        if wrong:
            return f"together: {wrong}"
    after = files_in(folder)
    wanted = scene.undisturbed(command)
    wrong = losses(before, after) or strays(before, after)
    if command in ("prepare", "generate"):  # the same whoever made it
        return wrong or wanted.lacks(folder)
    return wrong or next((f"{path} is missing" for path in wanted.exact if path not in results_in(folder)), "")


NAMES: dict[Way, str] = {
    killed: "one is killed",
    undisturbed: "undisturbed",
    mistaken: "a mistake",
    other_number: "resumed by another number",
}
POINTS: dict[Way, tuple[int, ...]] = {killed: (6, 9, 12), undisturbed: (9, 12), mistaken: (17,), other_number: (9,)}
