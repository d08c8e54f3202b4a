"""The latest comparisons, and their pictures as files that the browser may have."""

from __future__ import annotations

import itertools
from pathlib import Path

from ..compare import Comparison, Picture

KEPT = 12  # comparisons


class Album:
    """Comparisons by number, the latest of them, and PNG files in ``folder`` of what they show."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count(1)
        self._files: dict[Picture, Path] = {}
        self._kept: dict[int, Comparison] = {}

    def file(self, picture: Picture) -> Path:
        """A picture's file, which is written when it is first asked for."""
        if picture not in self._files:
            path = self._folder / f"{picture.name}-{next(self._numbers)}.png"
            path.write_bytes(picture.png())
            self._files[picture] = path
        return self._files[picture]

    def add(self, found: Comparison) -> int:
        """Keeps a comparison; returns its number. What is too old goes, and so do its files."""
        number = next(self._numbers)
        self._kept[number] = found
        for old in list(self._kept)[:-KEPT]:
            del self._kept[old]
        shown = {picture for each in self._kept.values() for picture in (each.teacher, each.student)}
        for picture in set(self._files) - shown:
            self._files.pop(picture).unlink(missing_ok=True)
        return number

    def get(self, number: int) -> Comparison | None:
        """The comparison of that number, if it is still kept."""
        return self._kept.get(number)

    def entries(self) -> list[tuple[int, Comparison, Path]]:
        """Newest first: number, comparison, and the student's file."""
        return [(number, found, self.file(found.student)) for number, found in reversed(self._kept.items())]
