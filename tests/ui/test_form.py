"""The form, the shelf and the album without a server."""

import shutil
from html import escape

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'sd-hyena[ui]'")

from sd_hyena.compare import Comparison, Picture, Studio
from sd_hyena.errors import UsageError
from sd_hyena.generate.draw import file_hash
from sd_hyena.sources import STUDENT, STUDENT_FILE
from sd_hyena.ui import album, shelf
from sd_hyena.ui.album import Album
from sd_hyena.ui.page import Page
from sd_hyena.ui.shelf import Shelf


def test_without_a_hyena_file(pipe, tmp_path):
    page = Page(Studio(pipe, "another"), Shelf(), Album(tmp_path), tmp_path)
    opened = page.form.open()
    assert "Drop a Hyena file" in opened[page.form.status]
    with pytest.raises(UsageError, match="no Hyena file is chosen"):
        page.form.read("x", "", "1", 2, 7.0, 64, 64, "model", None, [], [], [], [])


def test_what_is_read_is_in_running_order(pipe, tmp_path):
    page = Page(Studio(pipe, "demo"), Shelf(bundled=True), Album(tmp_path), tmp_path)
    chips = (["OUT11", "IN01"], [], [], ["M00"])
    settings, file, layers = page.form.read("x", "", "5", 2, 7.0, 64, 72, "euler", "the bundled student", *chips)
    assert (settings.seed, settings.height, settings.scheduler) == (5, 72, "euler")
    assert (file, layers) == (STUDENT, ["IN01", "M00", "OUT11"])


@pytest.mark.parametrize(
    ("file", "hash", "note"),
    [
        ("demo", file_hash("demo"), ""),
        ("demo", "0123456789", "; its Hyena file demo is another one here"),
        ("other.safetensors", "", "; its Hyena file other.safetensors is not here, the form's stays"),
    ],
)
def test_the_hyena_file_of_a_picture(pipe, tmp_path, file, hash, note):
    form = Page(Studio(pipe, "demo"), Shelf(bundled=True), Album(tmp_path), tmp_path).form
    info = PngInfo()
    fields = f"Steps: 3, Sampler: DDIM, Seed: 2, Hyena: {file}, Hyena hash: {hash}, Hyena layers: IN02 M00"
    info.add_text("parameters", f"x\n{fields}")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    filled = form._drop(str(tmp_path / "x.png"))
    assert f"in the form{escape(note)}." in filled[form.status]
    assert (filled[form.seed], filled[form.steps], filled[form.sampler]) == ("2", 3, "model")
    if file == "demo":
        assert [filled[chips]["value"] for chips in form.chips] == [["IN02"], [], [], ["M00"]]
    else:
        assert form.chips[0] not in filled


def test_the_shelf_looks_at_its_folder_anew(tmp_path):
    held = Shelf(str(tmp_path), bundled=True)
    assert list(held.files()) == ["the bundled student"]
    shutil.copy(STUDENT_FILE, tmp_path / "b.safetensors")
    (tmp_path / "c.ckpt").touch()
    (tmp_path / "d.safetensors").mkdir()
    assert held.files() == {"the bundled student": STUDENT, "b.safetensors": str(tmp_path / "b.safetensors")}
    (tmp_path / "b.safetensors").unlink()
    for name in ("b.safetensors", str(STUDENT_FILE), "../b.safetensors"):
        with pytest.raises(UsageError, match="there is no Hyena file"):
            held.file(name)


def test_what_may_be_dropped(tmp_path, monkeypatch):
    held = Shelf()
    (tmp_path / "x.ckpt").touch()
    (tmp_path / "x.safetensors").write_bytes(b"12345")
    with pytest.raises(UsageError, match=r"Hyena files are \.safetensors files"):
        held.add(tmp_path / "x.ckpt")
    name = held.add(tmp_path / "x.safetensors")
    assert held.file(name) == str(tmp_path / "x.safetensors")
    held.remove(name)
    assert held.files() == {}
    assert not (tmp_path / "x.safetensors").exists()
    monkeypatch.setattr(shelf, "MAX_UPLOAD", 4)
    (tmp_path / "y.safetensors").write_bytes(b"12345")
    with pytest.raises(UsageError, match="is larger than"):
        held.add(tmp_path / "y.safetensors")


def test_the_album_forgets(tmp_path, monkeypatch):
    monkeypatch.setattr(album, "KEPT", 2)

    def picture(name):
        return Picture(Image.new("RGB", (16, 16)), name, "", 1.0, 1.0, 1)

    held, teacher = Album(tmp_path), picture("teacher")
    numbers = []
    for n in range(4):
        student = picture(f"student{n}")
        held.file(teacher)
        numbers.append(held.add(Comparison(None, "demo", ("IN01",), teacher, student, 1.0, 1.0)))
        assert held.file(student).name.startswith(f"student{n}-")
    assert [number for number, _, _ in held.entries()] == numbers[:1:-1]
    assert held.get(numbers[0]) is None
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["student2", "student3", "teacher"]
