"""Writing files so that a crash at any moment leaves either the old file or the new one; the bundled one's name."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Where files are named, this name stands for the bundled model's student, unless a file is called so.
STUDENT = "demo"
STUDENT_FILE = Path(__file__).parent / "demo" / "student.safetensors"


def hyena_path(name: Path | str) -> Path:
    """The file that ``name`` means: itself, or the bundled student."""
    path = Path(os.path.expanduser(name))
    return STUDENT_FILE if str(name) == STUDENT and not os.path.isfile(path) else path


@contextlib.contextmanager
def atomic_path(path: Path | str, new: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is flushed, given mode 0644 and renamed.

    If the block raises, the temporary file is removed and whatever was at ``path`` is untouched. With ``new``,
    nothing is replaced: FileExistsError if something is there by then.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        (_rename_new if new else os.replace)(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
        temporary.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)


def write_new(path: Path, data: bytes) -> Path:
    """Writes a file that replaces none: if the name is taken, ``name-1``, ``name-2`` and so on. Returns its path."""
    for number in itertools.count():
        chosen = path.with_stem(f"{path.stem}-{number}") if number else path
        with contextlib.suppress(FileExistsError):
            with atomic_path(chosen, new=True) as temporary:
                temporary.write_bytes(data)
            return chosen
    raise AssertionError("there is always another number")
