"""The planted beds' table and figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_hyena.figures import pyplot, rendered
from sd_hyena.files import write_file
from sd_hyena.machine import describe

COLOURS = {"linear": "#c9962b", "near": "#2a9d6f", "long": "#0b3d66", "causal": "#777777", "windows": "#b3402e"}


def write(stem: Path, rows: Mapping[str, Any], facts: Mapping[str, Any], order: Sequence[str]) -> None:
    """STEM.json, STEM.md and STEM.png; ``rows`` by "teacher/seed/student"."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    beds = _by_teacher(rows, order)
    data = json.dumps({"machine": facts, "rows": rows}, indent=1)
    for suffix, text in ((".json", data), (".md", _table(beds, facts))):
        write_file(stem.with_suffix(suffix), text)
    write_file(stem.with_suffix(".png"), _plot(beds))


def _by_teacher(rows: Mapping[str, Any], order: Sequence[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """teacher -> student -> a row for each seed, students in order."""
    beds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for key, row in rows.items():
        teacher, _, student = key.split("/", 2)
        beds.setdefault(teacher, {}).setdefault(student, []).append(row)
    return {t: {name: students[name] for name in order if name in students} for t, students in beds.items()}


def _table(beds: Mapping[str, Mapping[str, list[dict[str, Any]]]], facts: Mapping[str, Any]) -> str:
    any_row = next(iter(next(iter(beds.values())).values()))[0]
    steps, seconds = any_row["settings"]["steps"], any_row["settings"]["seconds"]
    lines = [
        "# A planted layer",
        "",
        f"{describe(facts)}; {facts['date']}. `python benchmarks/planted.py`",
        "",
        "Relative error on held-out pictures (1: a constant's), the mean of the seeds and, in brackets, their least "
        f"and largest; after {steps} steps, and after {seconds:g} s of training. Without: the same steps, one branch "
        "switched off.",
    ]
    for teacher, students in beds.items():
        first = [row for rows in students.values() for row in rows]
        lines += [
            "",
            f"## {teacher} heads",
            "",
            f"Entropy {statistics.mean(r['entropy'] for r in first):.2f} of log L; "
            f"{statistics.mean(r['mass_7'] for r in first):.0%} of the attention within 7x7 cells (uniform: 4.3 %).",
            "",
            f"| student | at the start | {steps} steps | {seconds:g} s | ms a step | parameters | without near / long "
            "| states / softmax | global / mean |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, rows in students.items():
            middle = [_without(rows, names) for names in (("near", "long"), ("states", "softmax"), ("global", "mean"))]
            lines.append(
                f"| {name} | {statistics.mean(r['start'] for r in rows):.2f} | {_spread(rows, 'steps')} "
                f"| {_spread(rows, 'time')} | {1000 * statistics.median(r['step_seconds'] for r in rows):.0f} "
                f"| {rows[0]['parameters']:,} | {' | '.join(middle)} |"
            )
    return "\n".join(lines) + "\n"


def _spread(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _without(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    values = [row["without"][name] for row in rows for name in names if name in row["without"]]
    return f"{statistics.mean(values):.2f}" if values else "-"


def _plot(beds: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> bytes:
    """A panel for each teacher: bars at equal steps, a tick at equal time, dots for the seeds."""
    count = max(len(students) for students in beds.values())
    each = [row for students in beds.values() for rows in students.values() for row in rows]
    limit = min(1.05, 1.08 * max(max(row["steps"], row["time"]) for row in each))
    figure, axes = pyplot().subplots(
        1, len(beds), figsize=(2.2 + 3.6 * len(beds), 1.6 + 0.29 * count), sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axis, (teacher, students) in zip(axes[0], beds.items(), strict=True):
        for place, (name, rows) in enumerate(students.items()):
            colour = COLOURS.get(name.split()[0].rstrip(","), "#1f77b4")
            label = place == 0
            axis.barh(place, statistics.mean(r["steps"] for r in rows), color=colour, height=0.7, alpha=0.75)
            axis.plot([r["steps"] for r in rows], [place] * len(rows), "o", ms=3, color="#222",
                      label="a seed, equal steps" if label else None)  # fmt: skip
            axis.plot([r["time"] for r in rows], [place] * len(rows), "|", ms=9, mew=1.6, color="#222",
                      label="a seed, equal time" if label else None)  # fmt: skip
        axis.set_title(f"{teacher} heads", fontsize=10)
        axis.set_xlabel("relative error, held out")
        axis.set_xlim(0, limit)
        axis.set_yticks(range(len(students)), list(students))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7, loc="lower right")
    figure.suptitle("A planted softmax layer: how close each student comes")
    return rendered(figure)
