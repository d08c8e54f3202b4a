"""What a campaign tried and what failed."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Points = tuple[int, ...]  # of docs/faults.md
DETAIL = 400  # characters of a failure that are kept


@dataclass
class Row:
    """One kind of attack. ``failures``: what was wrong, and what does it again."""

    points: Points
    tried: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seed: int = 0


@dataclass
class Report:
    """``rows`` by what was tried; ``skipped``: what this machine does not permit, and why."""

    seed: int = 0
    part: str = ""
    only: int | None = None  # the one trial of a part that is wanted
    rows: dict[str, Row] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by part

    def tried(self, points: Points, what: str, count: int = 1) -> None:
        self._row(points, what).tried += count

    def failed(self, points: Points, what: str, detail: str, reproduce: str) -> None:
        """A trial that was counted by :meth:`tried` and went wrong."""
        self._row(points, what).failures.append((shortened(detail), reproduce))

    def verdict(self, points: Points, what: str, detail: str, reproduce: str) -> None:
        """One trial: ``detail`` is empty if it ended well."""
        self.tried(points, what)
        if detail:
            self.failed(points, what, detail, reproduce)

    def skip(self, what: str, why: str) -> None:
        self.skipped[what] = why

    def numbers(self, count: float) -> Iterator[int]:
        """The numbers of a part's trials, at least one, or the only one that is wanted."""
        yield from range(math.ceil(count)) if self.only is None else [self.only]

    def random(self, number: int) -> random.Random:
        """What one trial draws from: the same in every run with this seed, whichever trials were before it."""
        return random.Random(f"{self.part} {self.seed} {number}")

    def again(self, number: int | None = None) -> str:
        """The command that does one trial again, or the whole part."""
        command = f"python -m faults {self.part} --no-page --seed {self.seed}"
        return command if number is None else f"{command} --only {number}"

    @property
    def failures(self) -> int:
        return sum(len(row.failures) for row in self.rows.values())

    def kinds(self) -> list[str]:
        """A line for each kind of failure: how often, the first one, and what does it again."""
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for what, row in self.rows.items():
            for detail, reproduce in row.failures:
                found.setdefault((what, re.sub(r"[\d'\"].*", "", detail)[:60]), []).append((detail, reproduce))
        ordered = sorted(found.items(), key=lambda item: -len(item[1]))
        return [f"{what}: {len(each)} x {each[0][0]} [{each[0][1]}]" for (what, _), each in ordered]

    def add(self, other: Report) -> None:
        """Another report's rows, skips and times beside these."""
        for what, row in other.rows.items():
            mine = self._row(row.points, what)
            mine.tried, mine.seed = mine.tried + row.tried, row.seed
            mine.failures += row.failures
        self.skipped |= other.skipped
        self.seconds |= other.seconds

    def write(self, path: Path) -> None:
        rows = {what: [row.points, row.tried, row.failures, row.seed] for what, row in self.rows.items()}
        path.write_text(json.dumps([self.seed, rows, self.skipped, self.seconds]))

    @classmethod
    def read(cls, path: Path) -> Report:
        seed, rows, skipped, seconds = json.loads(path.read_text())
        report = cls(seed, skipped=skipped, seconds=seconds)
        for what, (points, tried, failures, row_seed) in rows.items():
            report.rows[what] = Row(tuple(points), tried, [(a, b) for a, b in failures], row_seed)
        return report

    def _row(self, points: Points, what: str) -> Row:
        return self.rows.setdefault(what, Row(tuple(points), seed=self.seed))


def shortened(text: str) -> str:
    """One printable line of a text, and not too much of it."""
    line = " ".join(text.split())
    safe = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return safe if len(safe) <= DETAIL else f"{safe[: DETAIL // 2]} ... {safe[-DETAIL // 2 :]}"
