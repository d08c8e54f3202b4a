"""Timing of callables, interleaved so that a noisy machine treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

UNSTEADY = 1.5  # times the lower quartile: where the upper one is beyond, other work was in the way


@dataclass
class Timing:
    """Milliseconds per call: median, and the quartiles as spread."""

    median: float
    low: float
    high: float
    repeats: int

    @property
    def steady(self) -> bool:
        """Whether the quartiles agree well enough for the median to mean something."""
        return self.high <= UNSTEADY * self.low

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Raises ValueError without samples."""
        if not samples:
            raise ValueError("nothing was timed")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs a callable and returns its milliseconds: by CUDA events, or by the clock."""
    if device.type == "cuda":

        def measure(call: Callable[[], object]) -> float:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            began.record()
            call()
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended)
    else:

        def measure(call: Callable[[], object]) -> float:
            started = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - started)

    return measure


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, budget: float
) -> dict[str, Timing]:
    """Times A B A B ...: at most ``repeats`` rounds in about ``budget`` seconds.

    Every callable has an equal share of the budget and sits out once that is spent, so that slow ones leave
    time for the others; but each is timed once, and three times if that fits the whole budget. The
    callables are to be warm already.
    """
    measure = stopwatch(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            spent = sum(samples[name]) / 1000
            wanted = spent < budget / len(calls) or (len(samples[name]) < 3 and 1.5 * spent < budget)
            if wanted or not samples[name]:
                samples[name].append(measure(call))
    return {name: Timing.of(values) for name, values in samples.items()}
