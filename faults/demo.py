"""``kill -9`` of the demonstration at ten moments: the same command again simply works."""

from __future__ import annotations

import shutil
import signal
import time

from . import hooks
from .judge import files_in, judge, losses, strays
from .report import Report
from .scene import Scene, spread

MOMENTS = 10
LINE = "demo -n 2 --n_images 4 --prompts 1 -s 1 --widths 64 -o out --overwrite"  # as `make demo`, but shorter


def run(report: Report, scale: float, seed: int) -> None:
    with Scene() as scene:
        log, whole = scene.root / "writes", scene.folder()
        before = files_in(whole)
        ending = scene.run(LINE, whole, hooks=[small, hooks.at_write(0, hooks.nothing, str(log))])
        made = {path for path in files_in(whole) if path not in before and "logs" not in path}
        told = ending.status, ending.stdout, ending.stderr, ending.seconds
        report.verdict((6, 12), "the demonstration, undisturbed", judge(*told, allowed=(0,), limit=300), report.again())
        if ending.status:
            return
        writes = log.read_text().splitlines()
        for number in report.numbers(MOMENTS * scale):
            draw, folder = report.random(number), scene.folder()
            before = files_in(folder)
            if number % 2:  # while it draws, learns and measures, else at a write
                started = scene.start(LINE, folder, hooks=[small])
                time.sleep(draw.uniform(0.1, 0.9) * ending.seconds)
                started.send(signal.SIGKILL)
                status = started.wait().status
            else:
                at = hooks.at_write(spread(number, len(writes)), hooks.kill)
                status = scene.run(LINE, folder, hooks=[small, at]).status
            wrong = "" if status in (0, -signal.SIGKILL) else f"the killed one ended with {status}"
            wrong = wrong or losses(before, files_in(folder)) or _again(scene, folder, before, made)
            shutil.rmtree(folder)
            report.verdict((6, 12), "kill -9 of the demonstration, then it again", wrong, report.again(number))


def _again(scene: Scene, folder: object, before: dict[str, str], made: set[str]) -> str:
    ending = scene.run(LINE, folder, hooks=[small])  # type: ignore[arg-type]
    after = files_in(folder)  # type: ignore[arg-type]
    wrong = judge(ending.status, ending.stdout, ending.stderr, ending.seconds, before, after, allowed=(0,), limit=300)
    missing = next((path for path in made if path not in after), "")
    return wrong or strays(before, after) or (missing and f"{missing} is missing")


def small() -> None:
    """The demonstration with pictures of 64 px, and few of them to measure on."""
    from sd_hyena.demo import run
    from sd_hyena.distill import trainer

    run.size_defaults = lambda model: {"width": 64, "height": 64}
    trainer.VALIDATION_SAMPLES = 2
