"""The Hyena files that the page may open: the bundled student, those of a folder, and those dropped in."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..sources import STUDENT
from ..texts import printable, shortened

ENDING = ".safetensors"
MAX_UPLOAD = 1 << 30  # bytes of a file from the browser


class Shelf:
    """Files by the names that the page shows. The browser gives names alone: what is not here is never opened."""

    def __init__(self, folder: str = "", bundled: bool = False) -> None:
        self._folder = Path(folder) if folder else None
        self._bundled = bundled
        self._dropped: dict[str, str] = {}

    def files(self) -> dict[str, str]:
        """What :func:`sd_hyena.checkpoint.load` takes, by name; the folder is looked at anew."""
        found = {"the bundled student": STUDENT} if self._bundled else {}
        if self._folder is not None:
            paths = sorted(path for path in self._folder.glob(f"*{ENDING}") if path.is_file())
            found |= {printable(path.name): str(path) for path in paths}
        return found | self._dropped

    def file(self, name: str | None) -> str:
        """The file of a name. Raises UsageError if there is none."""
        if not name:
            raise UsageError("no Hyena file is chosen: choose one, or drop one in")
        files = self.files()
        if name not in files:
            raise UsageError(f"there is no Hyena file {shortened(str(name))!r} here any more")
        return files[name]

    def add(self, path: Path) -> str:
        """Takes a dropped file; returns its name. Raises UsageError for one of another kind, or too large."""
        if path.suffix.lower() != ENDING:
            raise UsageError(f"{path.name}: Hyena files are {ENDING} files")
        if path.stat().st_size > MAX_UPLOAD:
            raise UsageError(f"{path.name}: is larger than {MAX_UPLOAD >> 20} MiB: put it into --hyena_dir")
        name = f"{printable(path.name)} (dropped)"
        self._dropped[name] = str(path)
        return name

    def remove(self, name: str) -> None:
        """Forgets a dropped file, and removes it."""
        Path(self._dropped.pop(name)).unlink(missing_ok=True)
