"""The bundled student: every layer, small, known as ``demo`` wherever a Hyena file is named."""

import pytest
from PIL import Image

import sd_hyena
from sd_hyena import checkpoint, patch
from sd_hyena.cli import main
from sd_hyena.errors import CheckpointError
from sd_hyena.evaluate import EvaluateSettings, evaluate
from sd_hyena.fingerprint import exact, fingerprint
from sd_hyena.sources import STUDENT_FILE


def test_it_holds_all_sixteen_layers_of_this_teacher(pipe):
    file = checkpoint.load("demo")
    assert list(file.layers) == sd_hyena.list_targets(pipe)
    assert len(file.layers) == 16
    assert file.teacher == exact(fingerprint(pipe))
    assert STUDENT_FILE.stat().st_size <= 10e6
    assert all(layer.figures["relative_error"] < 0.11 for layer in file.layers.values())


def test_it_draws_without_training(tmp_path, capsys):
    options = ["-m", "demo", "-s", "2", "-W", "64", "-H", "64", "-n", "1", "-k", "3", "--grid"]
    assert main(["generate", *options, "-y", ",demo", "-p", "a fox", "-o", str(tmp_path)]) == 0
    pictures = [Image.open(tmp_path / f"image_{n:03d}.png") for n in range(2)]
    assert "Hyena: demo" in pictures[1].text["parameters"]
    assert "Hyena" not in pictures[0].text["parameters"]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert main(["info", "demo"]) == 0
    assert "OUT11" in capsys.readouterr().out


def test_it_draws_what_its_teacher_draws(pipe):
    settings = EvaluateSettings(
        "demo", num_prompts=2, width=256, height=256, steps=6, layer_samples=0, no_yardstick=True
    )
    student = evaluate(pipe, {"student": ["demo"]}, settings).students[0]
    assert student.distances.figures()["psnr_mean_db"] > 25


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, pipe):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("something else")
    with pytest.raises(CheckpointError, match="is a text file, not weights"):
        sd_hyena.load_hyena(pipe, "demo")
    assert not patch.attached(pipe.unet)
