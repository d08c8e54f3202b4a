"""Writing files so that a crash at any moment leaves either the old file or the new one; the bundled one's name."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Where files are named, this name stands for the bundled model's student, unless a file is called so.
STUDENT = "demo"
STUDENT_FILE = Path(__file__).parent / "demo" / "student.safetensors"


def hyena_path(name: Path | str) -> Path:
    """The file that ``name`` means: itself, or the bundled student."""
    path = Path(name)
    return STUDENT_FILE if str(name) == STUDENT and not path.is_file() else path


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is flushed, given mode 0644 and renamed.

    If the block raises, the temporary file is removed and whatever was at ``path`` is untouched.
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
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
