"""``sd-hyena evaluate`` as a user types it, on the bundled model at 64 px."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena import checkpoint
from sd_hyena.cli import main
from sd_hyena.evaluate.settings import EvaluateSettings, labels
from sd_hyena.models import DEMO, load_pipeline, locate
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets

TRAIN = (
    "-m demo -t OUT10,OUT11 -W 64 -H 64 -b 2 -r 1e-3 -d 3 -n 3 --finetune_steps 1 -s 0 "
    "--n_images 4 --n_held_out 2 --draw_steps 2"
)
SMALL = "-m demo -n 2 -s 2 -W 64 -H 64 --layer_samples 2 --bands 2"
BANDS = [[0, 499], [500, 999]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained file of OUT10 and OUT11, and one with a random operator at IN01 that records no training."""
    folder = tmp_path_factory.mktemp("students")
    assert main(["train", *shlex.split(TRAIN), "-o", str(folder / "taught"), "-l", str(folder / "log")]) == 0
    unet = load_pipeline(locate(DEMO)).unet
    torch.manual_seed(0)
    target = find_targets(unet)["IN01"]
    config = OperatorConfig(target.dim, 8, 8, attention_heads=target.heads)
    checkpoint.save(folder / "random.safetensors", {"IN01": build(config)})
    return folder


def taught(folder):
    return f"{folder}/taught/Hyena-00004.safetensors"


def evaluate(*options):
    return main(["evaluate", *shlex.split(SMALL), *map(str, options)])


def figures_of(out):
    """What must be the same each time: everything but time and place."""
    figures = json.loads((out / "evaluation.json").read_text())
    for row in figures["rows"]:
        assert row.pop("seconds") > 0
    return {key: figures[key] for key in ("prompts", "seeds", "bands", "rows")}


@pytest.fixture(scope="module")
def evaluated(folder):
    """The whole of it: two students, one of them stacked, and the yardsticks."""
    out = folder / "evaluated"
    both = f"{taught(folder)},{folder}/random.safetensors+{taught(folder)}"
    assert evaluate("-y", both, "-o", out) == 0
    return out


def test_every_figure_of_every_row(evaluated):
    figures = figures_of(evaluated)
    assert figures["bands"] == BANDS
    rows = {row["label"]: row for row in figures["rows"]}
    students = ["Hyena-00004", "random+Hyena-00004"]
    assert list(rows) == ["teacher", "teacher, another attention backend", "teacher, bfloat16", *students]
    assert [row["kind"] for row in figures["rows"]] == ["teacher", "yardstick", "yardstick", "student", "student"]
    assert "psnr_mean_db" not in rows["teacher"]
    assert list(rows[students[0]]["layers"]) == ["OUT10", "OUT11"]
    assert list(rows[students[1]]["layers"]) == ["IN01", "OUT10", "OUT11"]
    assert rows[students[0]]["layers"]["OUT11"] == rows[students[1]]["layers"]["OUT11"]
    for row in figures["rows"][1:]:
        assert len(row["pictures"]["psnr"]) == len(row["pictures"]["ssim"]) == len(row["pictures"]["latent"]) == 2
        assert set(row["unet"]) == {"conditional", "guided"}
        assert len(row["unet"]["guided"]["bands"]) == 2
        assert set(row["scores"]) == {"prompt_fidelity", "subject_as_asked", "ground_as_asked", "place_as_asked"}
    # Closer first: the harmless changes, then two layers, then those and a third one that knows nothing.
    errors = [row["unet"]["conditional"]["relative_error"] for row in figures["rows"][1:]]
    assert errors == sorted(errors)
    assert errors[0] < 1e-8 < errors[2]
    assert rows[students[0]]["psnr_mean_db"] < rows["teacher, another attention backend"]["psnr_mean_db"]


def test_what_is_written(evaluated):
    assert sorted(p.name for p in evaluated.iterdir()) == [
        "errors.png", "evaluation.json", "evaluation.md", "report.html", "sheet.png",
    ]  # fmt: skip
    report = (evaluated / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2 * 3 + 1
    assert "http" not in re.sub(r"base64,[^\"]*", "", report.split("</style>")[1])
    text = (evaluated / "evaluation.md").read_text()
    assert "sd-hyena evaluate --model demo" in text
    assert "| random+Hyena-00004 |" in text
    assert "| OUT11 |" in text
    assert Image.open(evaluated / "sheet.png").size[1] > 3 * 192
    Image.open(evaluated / "errors.png").verify()
    figures = json.loads((evaluated / "evaluation.json").read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert "--layer_samples 2" in figures["command"]


def test_the_sheet_goes_from_best_to_worst():
    from sd_hyena.evaluate.pictures import Distances, Drawing
    from sd_hyena.evaluate.report import sheet
    from sd_hyena.evaluate.run import Evaluation, Row

    def flat(*values):
        return [Image.fromarray(np.full((192, 192, 3), v, dtype=np.uint8)) for v in values]

    rows = [
        Row("teacher", "teacher", Drawing(flat(10, 20, 30), torch.zeros(3, 4, 2, 2), 1.0)),
        Row("a", "student", Drawing(flat(11, 21, 31), torch.zeros(3, 4, 2, 2), 1.0)),
    ]
    rows[1].distances = Distances([20.0, 40.0, 30.0], [1.0] * 3, [0.0] * 3, [1.0] * 3)
    result = Evaluation(EvaluateSettings(model="demo"), ["p", "q", "r"], [0, 1, 2], [], rows, {})
    pixels = np.asarray(sheet(result).convert("L"))
    row = pixels.shape[0] // 2
    assert [pixels[row - 50, 100 + i * 198] for i in range(3)] == [20, 30, 10]
    assert [pixels[-50, 100 + i * 198] for i in range(3)] == [21, 31, 11]


def test_the_same_command_gives_the_same_figures_and_target_selects(folder, evaluated, capsys):
    out = folder / "again"
    assert evaluate("-y", taught(folder), "-o", out, "--no_yardstick") == 0
    again, first = figures_of(out), figures_of(evaluated)
    assert again["rows"] == [first["rows"][0], first["rows"][3]]
    printed = capsys.readouterr().out
    assert "PSNR" in printed
    assert "bfloat16" not in printed
    others = ("-y", taught(folder), "-t", "OUT11", "--no_yardstick", "--layer_samples", 0, "-o", out, "-k", "5")
    assert evaluate(*others) == 2
    assert f"{out / 'report.html'} exists: choose another --out_dir, or give --overwrite" in capsys.readouterr().err
    assert evaluate(*others, "--overwrite") == 0
    assert not (out / "errors.png").exists()  # of the evaluation that was replaced
    other = figures_of(out)
    assert other["rows"][0]["scores"].keys() == first["rows"][0]["scores"].keys()
    assert other["seeds"] == [5, 6]


def test_pictures_only(folder, tmp_path):
    assert evaluate("-y", taught(folder), "--no_yardstick", "--layer_samples", 0, "-o", tmp_path, "-c", 0) == 0
    student = figures_of(tmp_path)["rows"][1]
    assert "unet" not in student
    assert "layers" not in student
    assert student["ssim_mean"] < 1
    assert not (tmp_path / "errors.png").exists()


def test_other_models_draw_what_no_recipe_trains_on(folder, tmp_path):
    from sd_hyena.distill.prompts import GENERAL_PROMPTS
    from sd_hyena.models import DEMO_DIR

    options = ["-m", DEMO_DIR, "--no_yardstick", "--layer_samples", 0]
    assert evaluate("-y", taught(folder), *options, "-o", tmp_path / "out") == 0
    prompts = figures_of(tmp_path / "out")["prompts"]
    assert len(set(prompts)) == 2
    assert not set(prompts) & set(GENERAL_PROMPTS)


def test_a_prompts_file_is_drawn_in_turn_and_not_scored(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a castle on a hill\n")
    out = tmp_path / "out"
    options = ["--no_yardstick", "--layer_samples", 0, "--prompts", tmp_path / "prompts.txt"]
    assert evaluate("-y", taught(folder), *options, "-o", out) == 0
    figures = figures_of(out)
    assert figures["prompts"] == ["a castle on a hill"] * 2
    assert "scores" not in figures["rows"][0]


def test_from_python_the_teacher_is_measured_whatever_was_attached(folder, evaluated, pipe):
    from sd_hyena import load_hyena
    from sd_hyena.evaluate import evaluate as measure
    from sd_hyena.patch import attached

    settings = EvaluateSettings(
        model="demo", num_prompts=2, width=64, height=64, steps=2, layer_samples=2, bands=2, no_yardstick=True
    )
    load_hyena(pipe, folder / "random.safetensors")
    rows = measure(pipe, {"mine": [taught(folder)]}, settings).figures()["rows"]
    assert attached(pipe.unet) == {}
    first = figures_of(evaluated)["rows"]
    assert rows[0]["scores"] == first[0]["scores"]
    assert rows[1]["label"] == "mine"
    assert rows[1]["layers"] == first[3]["layers"]
    assert rows[1]["psnr_mean_db"] == first[3]["psnr_mean_db"]

    def fail(*args):
        raise RuntimeError("no score")

    with pytest.raises(RuntimeError, match="no score"):
        measure(pipe, {"mine": [taught(folder)]}, settings, scores=[fail])
    assert attached(pipe.unet) == {}


def test_names_tell_entries_apart():
    assert labels([["x/a.safetensors"], ["x/b.safetensors", "y/c.safetensors"]]) == ["a", "b+c"]
    assert labels([["x/a.safetensors"], ["y/a.safetensors"]]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["-y", ","], 2, "every entry must name a file"),
        ([], 2, "every entry must name a file"),
        (["-y", "{taught},{taught}"], 2, "is given twice"),
        (["-y", "none.safetensors"], 2, "no file none.safetensors"),
        (["-y", "{taught}+{taught}"], 2, "layer OUT10 is in more than one"),
        (["-y", "{taught}", "-n", "0"], 2, "--num_prompts is 0"),
        (["-y", "{taught}", "--bands", "0"], 2, "--bands is 0"),
        (["-y", "{taught}", "--layer-samples", "-1"], 2, "--layer_samples is -1"),
        (["-y", "{taught}", "-W", "8"], 2, "too small"),
        (["-y", "{taught}", "-t", "IN01"], 2, "holds no layer IN01"),
        (["-y", "{taught}", "--fid", "-n", "1"], 2, "--num_prompts must be at least 2"),
        (["-y", "{taught}", "--clip_model", "{out}/none"], 2, "--clip_model"),
    ],
)
def test_bad_requests_print_one_line_and_write_nothing(folder, tmp_path, capsys, options, status, message):
    names = {"taught": taught(folder), "random": folder / "random.safetensors", "out": tmp_path / "out"}
    assert evaluate(*(word.format(**names) for word in options)) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
