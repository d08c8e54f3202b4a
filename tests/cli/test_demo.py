"""``sd-hyena demo`` in miniature."""

import json
import re

import pytest
from PIL import Image

from sd_hyena.cli import main
from sd_hyena.demo import run


@pytest.mark.reliability(18)
@pytest.mark.usefixtures("no_network")
def test_demo_writes_pictures_figures_and_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "size_defaults", lambda model: {"width": 64, "height": 64})
    out = tmp_path / "demo"
    small = ["-n", "2", "--n_images", "4", "--prompts", "2", "-s", "2", "--widths", "64,128"]
    assert main(["demo", "-o", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed.replace("\n", "")
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2 * 2 + 1
    assert "data:image/svg+xml;base64," in report
    assert "<h2>Time of one layer</h2>" in report
    assert "http" not in re.sub(r"base64,[^\"]*", "", report.split("</style>")[1])
    figures = json.loads((out / "figures.json").read_text())
    assert set(figures["layers"]) == {"IN01", "IN02", "OUT09", "OUT10", "OUT11"}
    teacher, student = figures["evaluation"]["rows"]
    assert len(student["pictures"]["psnr"]) == 2
    assert set(teacher["scores"]) == {"prompt_fidelity", "subject_as_asked", "ground_as_asked", "place_as_asked"}
    assert {row["width"] for row in figures["times"]} == {64, 128}
    for name in ("00_teacher.png", "01_student.png", "side_by_side.png", "times.png"):
        Image.open(out / name).verify()
    assert main(["demo", "-o", str(out), *small]) == 2
    assert "report.html exists" in capsys.readouterr().err
    training = tmp_path / "training"
    training.mkdir()
    for name in (".train-state.pt", "Hyena-00002.safetensors"):
        (training / name).write_bytes((out / name).read_bytes())
    assert main(["demo", "-o", str(training), *small]) == 2
    assert main(["demo", "-o", str(training), *small, "--overwrite"]) == 2
    assert "holds a training run that is no demonstration's" in capsys.readouterr().err
    assert len(list(training.iterdir())) == 2
