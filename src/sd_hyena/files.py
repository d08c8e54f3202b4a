"""Writing files so that a crash at any moment leaves either the old ones or the new ones, and nobody's are lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import interrupts
from .errors import SdHyenaError, UsageError
from .texts import shortened

LOCK = ".sd-hyena-lock"
_OURS, _TEMPORARY = ".sd-hyena.", ".tmp"  # what names of unfinished files begin and end with
_HOST = socket.gethostname().replace(".", "-")
logger = logging.getLogger(__name__)


def write_file(path: Path | str, data: bytes | str, new: bool = False) -> None:
    """Writes a file, text as UTF-8: what stands there is replaced only once the new one is whole and on the disk.

    A link stays one. With ``new``, nothing is replaced: FileExistsError if something is there by then. Raises
    SdHyenaError if it cannot be written; what was there is then untouched.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        try:
            _write(Path(os.path.realpath(path)), data, new)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not remove_strays(Path(path).parent):
                raise
            _write(Path(os.path.realpath(path)), data, new)
    except FileExistsError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path | str, error: OSError) -> SdHyenaError:
    """The line for a file or folder that cannot be written."""
    return SdHyenaError(f"{shortened(str(path), 200)}: cannot write: {error.strerror or type(error).__name__}")


def write_new(path: Path, data: bytes | str) -> Path:
    """Writes a file that replaces none: if the name is taken, ``name-1``, ``name-2`` and so on. Returns its path."""
    for number in itertools.count():
        chosen = path.with_stem(f"{path.stem}-{number}") if number else path
        with contextlib.suppress(FileExistsError):
            write_file(chosen, data, new=True)
            return chosen
    raise AssertionError("there is always another number")


class Claim:
    """The files that a run may replace: those of ``paths`` that stand when it begins, and those it has written.

    What others put there meanwhile stays: the run's own file then goes beside it.
    """

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._known = {path: _mark(path) for path in paths}

    def remove(self, path: Path) -> None:
        """Removes what this run may replace."""
        if (mark := _mark(path)) is not None and mark == self._known.get(path):
            path.unlink()

    def write(self, path: Path, data: bytes | str) -> Path:
        """:func:`write_file`, or :func:`write_new` with a warning; returns where it went."""
        mark = _mark(path)
        if mark is not None and mark == self._known.get(path):
            write_file(path, data)
            written = path
        else:
            written = write_new(path, data)
        if written != path:
            logger.warning("%s has appeared meanwhile: this file is %s", path, written.name)
        self._known[written] = _mark(written)
        return written


def refuse_existing(paths: Iterable[Path], overwrite: bool, options: str = "--out_dir") -> None:
    """Raises UsageError if one of a run's files is there and may not be replaced; ``options`` name another place."""
    there = next((path for path in paths if os.path.lexists(path)), None)
    if there and not overwrite:
        raise UsageError(f"{there} exists: choose another {options}, or give --overwrite")


def make_folder(folder: Path | str) -> Path:
    """Makes a folder to write in, unless it is there; what earlier runs left unfinished in it goes. Raises SdHyenaError
    if it cannot be made."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    remove_strays(Path(folder))
    return Path(folder)


@contextlib.contextmanager
def locked(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Makes ``folder`` and holds it for one run, however that ends.

    If another run has it: raises UsageError, or, with ``wait``, says so in a line and waits for it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(make_folder(folder) / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        busy = f"output folder {folder} is in use by another run of sd-hyena"
        if wait is None:
            raise UsageError(busy) from None
        wait(f"{busy}: waiting for it")
        lock.acquire()
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from None
    try:
        yield
    finally:
        lock.release()


def remove_strays(folder: Path) -> bool:
    """Removes what killed runs on this machine left unfinished in a folder; returns whether there was anything."""
    import psutil

    removed = False
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{_OURS}{_HOST}.*.*{_TEMPORARY}"):
            pid = path.name.split(".")[3]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                removed = True
    return removed


def _write(path: Path, data: bytes, new: bool) -> None:
    temporary = path.with_name(_temporary_name())
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (_rename_new if new else os.replace)(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _temporary_name() -> str:
    return f"{_OURS}{_HOST}.{os.getpid()}.{uuid.uuid4().hex[:12]}{_TEMPORARY}"


def _flush_folder(folder: Path) -> None:
    """Has the new name on the disk too, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
        temporary.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)


def _mark(path: Path) -> Any:
    """What tells a file from another of its name, or None if there is none."""
    try:
        stat = path.lstat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@contextlib.contextmanager
def atomic_folder(folder: Path | str, remove: Collection[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``; on success what was written there takes its place in ``folder``, and
    the files named in ``remove`` go.

    If the block raises, or a file cannot be put in place, ``folder`` is as it was. What else is in it stays.
    """
    folder = Path(os.path.expanduser(folder)).resolve()
    make_folder(folder.parent)
    beside = folder.with_name(_temporary_name())
    beside.mkdir(0o700)
    new, old = beside / "new", beside / "old"
    try:
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
                write_file(folder / path.name, path.read_bytes())
            for name in names[len(written) :]:
                (folder / name).unlink()
        except BaseException:
            with interrupts.unit():
                for name in names:
                    if (old / name).exists():
                        os.replace(old / name, folder / name)
                    else:
                        (folder / name).unlink(missing_ok=True)
                if not there_before:
                    folder.rmdir()
            raise
    finally:
        with interrupts.unit():
            shutil.rmtree(beside)
