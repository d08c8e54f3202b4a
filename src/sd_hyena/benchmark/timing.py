"""Timing and peak memory of callables, interleaved so that a noisy machine treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass
class Timing:
    """Milliseconds per call: median, and the quartiles as spread."""

    median: float
    low: float
    high: float
    repeats: int


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, Timing]:
    """Times A B A B ...: at least 3 and at most ``repeats`` rounds, stopping after ``budget`` seconds.

    Each callable is warmed up once first.
    """
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - started > budget:
            break
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - began))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))
