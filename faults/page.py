"""docs/faults.md: what was tried and what failed, and the tests that hold each point.

``python -m faults.page`` rewrites the second part alone, from the marks on the tests.
"""

from __future__ import annotations

import ast
import os
import platform
from importlib.metadata import version
from pathlib import Path

from .report import Report, Row

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "faults.md"
TESTS = ROOT / "tests"
POINTS = {
    1: "Damaged files: empty, cut short, too long, absurd headers, duplicate keys: one line that names the file",
    2: "Hostile metadata is bounded before anything is allocated",
    3: "A malicious pickle is refused, and its payload never runs",
    4: "Wrong family, channels, target or heads are named; NaN and infinite weights are refused",
    5: "Thousands of mutated files: no uncaught exception, never a partly patched UNet",
    6: "SIGKILL at any write: the newest complete file loads; temporary files are cleaned",
    7: "A full disk, a read-only or vanished folder: what was there stays intact, and the message is clear",
    8: "Old files go only after new ones are complete; foreign files are never touched",
    9: "Resumed training is the uninterrupted one, bit for bit",
    10: "Signals: finish the step, save, leave; a second one leaves at once",
    11: "The saved step number is the number of updates applied",
    12: "Two runs in one folder: the second refuses",
    13: "NaN and infinity: no update, the last good file kept, reported",
    14: "Out of memory: smaller batches and slices, the same result, logged",
    15: "Attach and detach a hundred times: bit-identical, no growth",
    16: "Names and formats of names: refused with what is allowed; nothing is overwritten unasked",
    17: "Sizes, models, targets and every option: a clear message before anything is loaded",
    18: "No network unless it is asked for",
}
HELD = "## Which tests hold each point\n"
HEAD = """# Faults that were tried

`make faults` attacks every command and writes this page: {tried:,} trials, {failed} failed, seed {seed}, in
{minutes:.0f} minutes on {cores} cores{part} ({machine}; Python {python}, torch {torch}, diffusers {diffusers},
transformers {transformers}). A trial fails if a command ends in a traceback, hangs, loses or half writes a file, says
nothing of a failure, says it in a library's words or without naming the file, or lets a terminal's control characters
through.
"""


def page(report: Report, scale: float = 1, seconds: float = 0) -> str:
    tried = {point: sum(row.tried for row in report.rows.values() if point in row.points) for point in POINTS}
    failed = {point: sum(len(row.failures) for row in report.rows.values() if point in row.points) for point in POINTS}
    head = HEAD.format(
        tried=sum(row.tried for row in report.rows.values()),
        failed=report.failures,
        seed=report.seed,
        part="" if scale == 1 else f", at {scale:g} of the full counts",
        minutes=seconds / 60,
        cores=os.cpu_count(),
        machine=f"{platform.system()}, {platform.machine()}",
        python=platform.python_version(),
        **{name: version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers")},
    )
    lines = [head, "| | point | tried | failed |", "|---:|---|---:|---:|"]
    lines += [f"| {point} | {what} | {tried[point] or '-'} | {failed[point]} |" for point, what in POINTS.items()]
    lines += ["", "A trial counts for every point that it tries.", "", "## Attacks", ""]
    lines += ["| attack | kinds | points | tried | failed | seed |", "|---|---|---|---:|---:|---:|"]
    groups: dict[str, list[tuple[str, Row]]] = {}
    for what, row in sorted(report.rows.items()):
        group, _, kind = what.partition(": ")
        groups.setdefault(group, []).append((kind, row))
    for group, kinds in groups.items():
        points = ", ".join(map(str, sorted({point for _, row in kinds for point in row.points})))
        count, wrong = (sum(each) for each in zip(*((row.tried, len(row.failures)) for _, row in kinds), strict=True))
        names = ", ".join(kind for kind, _ in kinds if kind)
        lines.append(f"| {group} | {names} | {points} | {count:,} | {wrong} | {kinds[0][1].seed} |")
    if report.failures:
        lines += ["", "## Failures", "", *(f"- {line}" for line in report.kinds())]
    if report.skipped:
        lines += ["", "## Not tried on this machine", ""]
        lines += [f"- {what}: {why}" for what, why in sorted(report.skipped.items())]
    return "\n".join([*lines, "", held()])


def held() -> str:
    """The tests by point, from their marks ``@pytest.mark.reliability(...)``."""
    tests = marked()
    lines = [HELD, "| | tests |", "|---:|---|"]
    lines += [f"| {point} | {', '.join(f'`{test}`' for test in tests[point]) or '-'} |" for point in POINTS]
    return "\n".join([*lines, ""])


def marked() -> dict[int, list[str]]:
    """By point: the tests whose marks name it."""
    found: dict[int, list[str]] = {point: [] for point in POINTS}
    for path in sorted(TESTS.rglob("test_*.py")):
        for test in ast.parse(path.read_text()).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                for call in (node for decorator in test.decorator_list for node in ast.walk(decorator)):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.reliability":
                        for point in map(ast.literal_eval, call.args):
                            found[point].append(f"{path.relative_to(TESTS)}::{test.name}")
    return {point: list(dict.fromkeys(tests)) for point, tests in found.items()}


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(HELD)[0] + held())
