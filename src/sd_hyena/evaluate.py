"""How far a student's pictures are from its teacher's: the same prompts and seeds, with and without Hyena."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from . import patch
from .generate.draw import sample

MAX_PSNR = 100.0  # what identical pictures count as
BATCH = 4


@dataclass
class Comparison:
    """Teacher's and student's pictures for the same prompts and seeds, and the figures taken from them.

    ``fidelity`` is filled where a scorer is at hand: per attribute, the share of pictures that show it.
    Seconds are per picture.
    """

    prompts: list[str]
    seeds: list[int]
    teacher: list[Image.Image]
    student: list[Image.Image]
    teacher_seconds: float
    student_seconds: float
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def psnr(self) -> list[float]:
        """Peak signal-to-noise ratio of each pair, in dB."""
        return [psnr(a, b) for a, b in zip(self.teacher, self.student, strict=True)]

    @property
    def mean_psnr(self) -> float:
        return statistics.mean(self.psnr)

    def figures(self) -> dict[str, Any]:
        """Everything measured, as plain numbers."""
        return {
            "pictures": len(self.prompts),
            "psnr_mean_db": self.mean_psnr,
            "psnr_min_db": min(self.psnr),
            "teacher_seconds": self.teacher_seconds,
            "student_seconds": self.student_seconds,
            "fidelity": self.fidelity,
        }


def psnr(a: Image.Image, b: Image.Image) -> float:
    """``10 log10(255^2 / MSE)`` of two 8-bit RGB pictures of the same size, at most MAX_PSNR."""
    x, y = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (a, b))
    mse = np.square(x - y).mean()
    return MAX_PSNR if mse == 0 else min(MAX_PSNR, float(10 * np.log10(255**2 / mse)))


def compare(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Comparison:
    """Draws every prompt with the attached Hyena layers switched off, then on.

    ``options`` go to the pipeline (size, steps, guidance). The layers are left switched on.
    """
    pictures: dict[bool, list[Image.Image]] = {False: [], True: []}
    seconds = {False: 0.0, True: 0.0}
    for start in range(0, len(prompts), BATCH):
        chunk = slice(start, start + BATCH)
        for student in (False, True):
            patch.set_enabled(pipe.unet, student)
            began = time.perf_counter()
            pictures[student] += sample(pipe, prompts[chunk], seeds[chunk], **options)
            seconds[student] += time.perf_counter() - began
        progress(len(pictures[True]), len(prompts))
    count = len(prompts)
    return Comparison(
        list(prompts), list(seeds), pictures[False], pictures[True], seconds[False] / count, seconds[True] / count
    )


def add_fidelity(comparison: Comparison) -> None:
    """Scores both sets with the bundled model's recognition scorer. The prompts must be its captions."""
    from .demo.scorer import fidelity, load_scorer
    from .models import DEMO_DIR

    scorer = load_scorer(DEMO_DIR)
    comparison.fidelity = {
        "teacher": fidelity(scorer, comparison.teacher, comparison.prompts),
        "student": fidelity(scorer, comparison.student, comparison.prompts),
    }
