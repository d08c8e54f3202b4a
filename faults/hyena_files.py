"""Mutated Hyena files."""

from __future__ import annotations

from .report import Report


def run(report: Report, scale: float, seed: int) -> None:
    for number in report.numbers(2000 * scale):
        report.verdict((1, 2, 4, 5), "Hyena files", "", report.again(number))
