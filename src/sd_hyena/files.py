"""Writing files so that a crash at any moment leaves either the old ones or the new ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path


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


@contextlib.contextmanager
def atomic_folder(folder: Path | str, remove: Collection[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``; on success what was written there takes its place in ``folder``, and
    the files named in ``remove`` go.

    If the block raises, or a file cannot be put in place, ``folder`` is as it was. What else is in it stays.
    """
    folder = Path(os.path.expanduser(folder)).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        new.mkdir()
        old.mkdir()
        yield new
        there_before = folder.exists()
        folder.mkdir(exist_ok=True)
        written = sorted(new.iterdir())
        names = [path.name for path in written] + [name for name in remove if (folder / name).exists()]
        for name in names:
            if (folder / name).exists():
                shutil.copy2(folder / name, old / name)
        try:
            for path in written:
                with atomic_path(folder / path.name) as temporary:
                    os.replace(path, temporary)
            for name in names[len(written) :]:
                (folder / name).unlink()
        except BaseException:
            for name in names:
                if (old / name).exists():
                    os.replace(old / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            if not there_before:
                folder.rmdir()
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
