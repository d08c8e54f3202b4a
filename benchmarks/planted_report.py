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

OURS = "#1f77b4"
COLOURS = dict.fromkeys(("linear", "windows"), "#a87412") | dict.fromkeys(("long", "causal"), "#777777")


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
    """A panel for each teacher: the seeds' mean at equal steps as a point, their range as a line, and equal time as a
    ring."""
    count = max(len(students) for students in beds.values())
    figure, axes = pyplot().subplots(
        1, len(beds), figsize=(2.0 + 2.9 * len(beds), 1.5 + 0.3 * count), sharex=True, sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axis, (teacher, students) in zip(axes[0], beds.items(), strict=True):
        for place, (name, rows) in enumerate(students.items()):
            colour = COLOURS.get(name.split()[0].rstrip(","), OURS)
            steps = [row["steps"] for row in rows]
            mean = statistics.mean(steps)
            axis.plot([min(steps), max(steps)], [place] * 2, color=colour, linewidth=3, alpha=0.4)
            axis.plot([statistics.mean(row["time"] for row in rows)], [place], "o", ms=8, mfc="none", color=colour)
            axis.plot([mean], [place], "o", ms=5, color=colour)
            axis.annotate(f"{mean:.2f}", (1.0, place), xycoords=("axes fraction", "data"), fontsize=8.5, color=colour,
                          horizontalalignment="right", verticalalignment="center")  # fmt: skip
        axis.set_title(f"{teacher} heads", fontsize=11, loc="left")
        axis.set_yticks(range(len(students)), list(students))
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="both", alpha=0.25)
    axes[0][0].invert_yaxis()
    axes[0][0].set_xlim(0, 1.2 * axes[0][0].get_xlim()[1])
    figure.suptitle(
        "A planted softmax layer: relative error of each student on held-out pictures\n"
        "point and number: equal steps, with the range of the seeds; ring: equal time",
        fontsize=10,
    )
    return rendered(figure)
