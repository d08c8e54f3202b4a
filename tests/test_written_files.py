"""Writing files: whole or not at all, nobody's are lost, one line where it cannot be done."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from sd_hyena import files
from sd_hyena.errors import SdHyenaError, UsageError
from sd_hyena.files import Claim, locked, refuse_existing, remove_strays, write_file, write_new


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.reliability(6)
def test_a_file_is_replaced_whole_with_usual_rights_and_links_stay(tmp_path):
    target, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(target)
    write_file(link, "é")
    write_file(link, b"two")
    assert target.read_bytes() == b"two"
    assert link.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    assert names(tmp_path) == {"a", "link"}


@pytest.mark.reliability(6, 7)
@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_if_writing_fails(tmp_path, monkeypatch, broken, error):
    target = tmp_path / "a"
    target.write_text("old")
    monkeypatch.setattr(os, broken, lambda *arguments: (_ for _ in ()).throw(error))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SdHyenaError
    with pytest.raises(expected) as raised:
        write_file(target, "new")
    if expected is SdHyenaError:
        assert str(raised.value) == f"{target}: cannot write: No space left on device"
    assert target.read_text() == "old"
    assert names(tmp_path) == {"a"}


@pytest.mark.reliability(7)
@pytest.mark.parametrize("place", ["gone/a", "file/a", "folder"])
def test_places_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SdHyenaError, match="cannot write: "):
        write_file(tmp_path / place, "x")
    assert names(tmp_path) == {"file", "folder"}


def a_stray(folder):
    """An unfinished file of a process that has ended, as a SIGKILL leaves it."""
    code = "import os, sys; from sd_hyena import files; os.fsync = lambda handle: os._exit(9); "
    code += "files.write_file(sys.argv[1], 'x')"
    before = set(folder.iterdir())
    assert subprocess.run([sys.executable, "-c", code, str(folder / "a")]).returncode == 9
    (stray,) = {*folder.iterdir()} - before
    return stray


@pytest.mark.reliability(6, 8)
def test_what_killed_runs_leave_goes_and_what_others_leave_stays(tmp_path, monkeypatch):
    foreign = [
        ".a.xyz.tmp",
        ".sd-hyena.tmp",
        ".sd-hyena.elsewhere.1.abc.tmp",
        "b.tmp",
        f".sd-hyena.x.{os.getpid()}.abc.tmp",
    ]
    for name in foreign:
        (tmp_path / name).touch()
    mine = tmp_path / files._temporary_name()
    mine.touch()  # of this process, which still lives
    stray = a_stray(tmp_path)
    with locked(tmp_path):
        pass
    assert not stray.exists()
    assert names(tmp_path) == {*foreign, mine.name, files.LOCK}
    assert not remove_strays(tmp_path / "none")


@pytest.mark.reliability(7)
def test_a_full_disk_is_tried_again_without_strays(tmp_path, monkeypatch):
    stray, fsync = a_stray(tmp_path), os.fsync

    def full(handle):
        if stray.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    write_file(tmp_path / "a", "x")
    assert names(tmp_path) == {"a"}


@pytest.mark.reliability(12)
def test_a_folder_is_held_by_one(tmp_path):
    with (
        locked(tmp_path / "new"),
        pytest.raises(UsageError, match="in use by another run"),
        locked(tmp_path / "new"),
    ):
        pass
    with locked(tmp_path / "new"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(SdHyenaError, match="cannot write"), locked(tmp_path / "file"):
        pass


@pytest.mark.reliability(8, 16)
@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_is_kept(tmp_path, monkeypatch, caplog, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_text("old")
    with pytest.raises(UsageError, match=r"old.png exists: choose another --out_dir, or give --overwrite"):
        refuse_existing([new, old], overwrite=False)
    refuse_existing([new, old], overwrite=True)
    claim = Claim([new, old])
    new.write_text("foreign")
    assert claim.write(old, "mine") == old
    assert claim.write(new, "mine") == tmp_path / "new-1.png"
    assert caplog.messages == [f"{new} has appeared meanwhile: this file is new-1.png"]
    assert claim.write(old, "mine again") == old
    old.unlink()
    old.write_text("foreign")
    assert claim.write(old, "mine") == tmp_path / "old-1.png"
    assert Claim().write(tmp_path / "new.png", "x") == tmp_path / "new-2.png"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "old.png": "foreign", "new.png": "foreign", "old-1.png": "mine", "new-1.png": "mine", "new-2.png": "x",
    }  # fmt: skip
    assert write_new(tmp_path / "z", b"x") == tmp_path / "z"
