"""``sd-hyena demo`` and ``benchmark`` in miniature."""

import json

import pytest
import torch
from PIL import Image

from sd_hyena.benchmark import layers
from sd_hyena.cli import main
from sd_hyena.errors import SdHyenaError


def test_demo_writes_pictures_figures_and_a_report(tmp_path, capsys):
    out = tmp_path / "demo"
    small = ["-n", "2", "--n_images", "4", "--prompts", "2", "-s", "2", "--widths", "64,128"]
    assert main(["demo", "-o", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed.replace("\n", "")
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4
    assert "data:image/svg+xml;base64," in report
    assert "http" not in report.split("</style>")[1]
    figures = json.loads((out / "figures.json").read_text())
    assert set(figures["layers"]) == {"IN01", "IN02", "OUT09", "OUT10", "OUT11"}
    assert figures["comparison"]["pictures"] == 2
    assert {row["width"] for row in figures["times"]} == {64, 128}
    for name in ("00_teacher.png", "01_student.png", "side_by_side.png", "times.png"):
        Image.open(out / name).verify()
    assert main(["demo", "-o", str(out), *small]) == 2
    assert "report.html exists" in capsys.readouterr().err


def test_benchmark_prints_and_writes_tables_and_figures(tmp_path, capsys):
    options = ["--widths", "128,64", "--dim", "16", "--heads", "2", "--batch-size", "2", "--budget", "0.1"]
    assert main(["benchmark", *options, "--out", str(tmp_path / "sub" / "cpu")]) == 0
    assert "faster than attention" in capsys.readouterr().out
    document = json.loads((tmp_path / "sub" / "cpu.json").read_text())
    assert [row["width"] for row in document["rows"]] == [64] * 4 + [128] * 4
    assert document["machine"]["torch"] == torch.__version__
    assert (tmp_path / "sub" / "cpu.md").read_text().count("|") > 20
    for suffix in (".png", ".svg"):
        assert (tmp_path / "sub" / "cpu").with_suffix(suffix).stat().st_size > 1000


@pytest.mark.parametrize("options", [["--widths", "100"], ["--widths", "a"], ["--dim", "7"], ["--heads", "0"]])
def test_bad_benchmarks(options):
    assert main(["benchmark", *options]) == 2


def test_no_times_are_reported_for_a_convolution_that_is_wrong(monkeypatch):
    right = layers.fft.conv2d
    monkeypatch.setattr(layers.fft, "conv2d", lambda *args: right(*args) * 1.001)
    with pytest.raises(SdHyenaError, match="no times are reported"):
        layers.run_sizes([64], 8, 2, 1, 0.1, lambda row: None)


@pytest.mark.parametrize("grid", [(5, 7), (50, 51), (64, 64)])
def test_the_convolution_check_passes_for_the_right_one(grid):
    assert layers.check_convolution(grid, channels=2) < 1e-5
