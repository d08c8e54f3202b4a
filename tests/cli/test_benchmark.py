"""``sd-hyena benchmark`` as a user would type it, at small sizes."""

import csv
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd_hyena.cli import main
from sd_hyena.families import FAMILIES
from sd_hyena.ops.mix import cpu

ROOT = Path(__file__).parents[2]
SMALL = ["--dim", "16", "--heads", "2", "--budget", "0.1", "--repeats", "2"]


def written(stem, rows):
    """The files of a run, checked; returns the JSON."""
    document = json.loads(stem.with_suffix(".json").read_text())
    assert len(document["rows"]) == rows
    assert document["machine"]["torch"] == torch.__version__
    assert {"cpu", "threads", "python", "date"} <= document["machine"].keys()
    assert document["command"].startswith("sd-hyena benchmark")
    with open(stem.with_suffix(".csv"), newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == rows
    assert table[0]["torch"] == torch.__version__
    assert document["command"] in stem.with_suffix(".md").read_text()
    Image.open(stem.with_suffix(".png")).verify()
    assert "<svg" in stem.with_suffix(".svg").read_text()
    return document


def test_layer(tmp_path, capsys):
    stem = tmp_path / "sub" / "layer"
    kinds = "naive,sdp,causal,states,projections"
    size = ["-W", "128", "-H", "64", "-b", "2"]
    assert (
        main(["benchmark", "layer", "-W", "128", "-H", "64", "-b", "2", *SMALL, "--kinds", kinds, "--out", str(stem)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "best" in printed
    assert "agrees with its definition" in printed.replace("\n", " ")
    document = written(stem, 8)
    timed = {row["kind"]: row for row in document["rows"] if row["ms"]}
    assert set(timed) >= {"naive", "sdp-math", "causal", "states", "projections"}
    for row in timed.values():
        assert row["parameters"] > 0
        assert row["peak_bytes"] > 0
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["error"] < 1e-4
    assert (row["width"], row["height"], row["batch"]) == (128, 64, 2)
    repeated = ["benchmark", "layer", *SMALL, *size, "--kinds", "sdp", "--out", str(stem)]
    assert main(repeated) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*repeated, "--overwrite"]) == 0


def test_sizes_crossover_and_comparison(tmp_path, capsys):
    stem = tmp_path / "sizes"
    options = ["benchmark", "sizes", *SMALL, "--kinds", "sdp-math,hyena", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert main([*options, "--widths", "128,64", "--backward", "--out", str(stem)]) == 0
    finally:
        torch.set_num_threads(threads)
    document = written(stem, 12)
    assert [row["width"] for row in document["rows"]] == [64] * 6 + [128] * 6
    assert all(row["backward"] for row in document["rows"])
    printed = capsys.readouterr().out
    assert re.search(r"states: (faster than attention from|no faster)", printed)
    assert main([*options, "--widths", "64", "--backward", "--compare", str(stem.with_suffix(".json"))]) == 0
    assert "compared with" in capsys.readouterr().out
    assert main([*options, "--widths", "72", "--compare", str(stem.with_suffix(".json"))]) == 2


def test_image_with_the_bundled_model(tmp_path, capsys):
    stem = tmp_path / "image"
    options = ["-m", "demo", "-t", "IN01,OUT11", "-W", "64", "-H", "96", "-s", "2", "--repeats", "1"]
    assert main(["benchmark", "image", *options, "--attention", "sdpa,naive", "--out", str(stem)]) == 0
    document = written(stem, 3)
    sdpa, _naive, hyena = document["rows"]
    assert hyena["replaced"] == "IN01 OUT11"
    layers = [key for key in sdpa if re.fullmatch(r"ms_(IN|OUT|M)\d\d", key)]
    assert len(layers) == 16
    for row in document["rows"]:
        assert row["error"] < 1e-4
        assert sum(row[key] for key in layers) < row["ms"]
        assert row["s_per_image"] > 0
        assert row["peak_bytes"] >= row["unet_peak_bytes"] > 0
    printed = capsys.readouterr().out
    assert "OUT11" in printed
    assert main(["benchmark", "image", *options, "--compare", str(stem.with_suffix(".json"))]) == 0


def test_image_with_a_hyena_file_and_untrained_cores(tmp_path):
    run = ["-m", "demo", "-t", "OUT11", "-n", "1", "-b", "2", "-W", "64", "-H", "64", "--n_images", "2", "-d", "1"]
    run += ["--n_held_out", "1", "--draw_steps", "1", "-s", "0", "--operator", "causal"]
    assert main(["train", *run, "-o", str(tmp_path / "out"), "-l", str(tmp_path / "logs")]) == 0
    file = next((tmp_path / "out").glob("*.safetensors"))
    common = ["-m", "demo", "-W", "64", "-H", "64", "-s", "1", "--repeats", "1", "-c", "0", "-n", "2"]
    assert main(["benchmark", "image", *common, "-y", str(file), "--out", str(tmp_path / "file")]) == 0
    assert written(tmp_path / "file", 2)["rows"][1]["replaced"] == "OUT11"
    core = ["--form", "core", "--feature_map", "exp", "--near", "5", "--dtype", "bfloat16"]
    assert main(["benchmark", "image", *common, *core]) == 0


def test_image_with_random_weights(tmp_path, monkeypatch):
    """The real thing with fewer channels: Stable Diffusion 1.5's would take a minute here."""
    small = {}
    for name, extra in (("sd15", {}), ("sdxl", {"transformer_layers_per_block": [1, 1, 2]})):
        family = replace(FAMILIES[name], configs=tmp_path / name)
        config = FAMILIES[name].config("unet") | extra | {"attention_head_dim": 4, "norm_num_groups": 4}
        config["block_out_channels"] = [c // 10 for c in config["block_out_channels"]]
        vae = FAMILIES["sd15"].config("vae") | {"block_out_channels": [32] * 4}
        for component, values in (("unet", config), ("vae", vae)):
            (family.configs / component).mkdir(parents=True)
            (family.configs / component / "config.json").write_text(json.dumps(values))
        small[name] = family
    for name, family in small.items():
        monkeypatch.setitem(FAMILIES, name, family)
    for name in ("sd15", "sdxl"):
        stem = tmp_path / f"image-{name}"
        options = ["--random_weights", name, "-W", "64", "-H", "64", "-s", "1", "--repeats", "1"]
        assert main(["benchmark", "image", *options, "--out", str(stem)]) == 0
        assert written(stem, 2)["rows"][1]["error"] < 1e-4


def test_a_wrong_layer_in_a_generation_is_caught(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "run", lambda call, run=cpu.run: 1.01 * run(call))
    options = ["-m", "demo", "-t", "OUT11", "-W", "64", "-H", "64", "-s", "1"]
    assert main(["benchmark", "image", *options]) == 1
    assert "layer OUT11 is off by" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["layer", "image"])
@pytest.mark.reliability(14)
def test_where_nothing_can_be_measured_nothing_is_replaced(tmp_path, monkeypatch, capsys, what):
    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("sd_hyena.benchmark.measure._prepare", no_memory)
    monkeypatch.setattr("sd_hyena.benchmark.image._checked", no_memory)
    options = {"layer": [*SMALL, "--kinds", "sdp-math"], "image": ["-m", "demo", "-s", "1", "-t", "OUT11"]}[what]
    (tmp_path / "earlier.json").write_text("old")
    out = ["--out", str(tmp_path / "earlier"), "--overwrite"]
    assert main(["benchmark", what, "-W", "64", "-H", "64", *options, *out]) == 1
    assert "nothing was measured, so nothing is written: sdp" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layer", "--dim", "7"], "multiple of --heads"),
        (["layer", "--heads", "0"], "but must be from 1 to"),
        (["layer", "-W", "100"], "multiple of 8"),
        (["layer", "--kinds", "hyena3d"], "is no kind"),
        (["layer", "--compare", "missing.json"], "no such file"),
        (["layer", "--compare", __file__], "not the .json of"),
        (["layer", "--threads", "-1"], "but must be from 0 to"),
        (["sizes", "--widths", "a"], "separated by commas"),
        (["sizes", "--widths", "64,64"], "twice"),
        (["sizes", "-b", "0"], "but must be from 1 to"),
        (["image"], "either -m/--model or --random_weights"),
        (["image", "-m", "demo", "--random_weights", "sd15"], "either -m/--model or --random_weights"),
        (["image", "--random_weights", "sd15", "-y", __file__], "--hyena needs a model"),
        (["image", "-m", "nowhere.safetensors"], "not found"),
        (["image", "-m", "demo", "-y", "missing"], "no file missing"),
        (["image", "-m", "demo", "-t", "IN03"], "IN03"),
        (["image", "-m", "demo", "--attention", "flash"], "none of sdpa"),
        (["image", "-m", "demo", "-s", "0"], "but must be from 1 to"),
        (["image", "-m", "demo", "--near", "4"], "near must be odd"),
        (["layer", "--device", "tpu"], "use auto, cpu"),
    ],
)
def test_bad_requests_are_one_line(options, message, capsys):
    assert main(["benchmark", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_damaged_hyena_file_is_reported_before_loading(tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a file")
    assert main(["benchmark", "image", "-m", "demo", "-y", str(bad)]) == 1
    assert "bad.safetensors" in capsys.readouterr().err


@pytest.fixture
def _benchmarks(monkeypatch):
    """Scripts find what lies beside them, as they do when Python runs them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.usefixtures("_benchmarks")
@pytest.mark.parametrize("script", ["cpu_suite", pytest.param("gpu_suite", marks=pytest.mark.nightly)])
def test_suites_run_small(script, tmp_path, monkeypatch):
    stem = tmp_path / "results" / "cpu"
    device = ["--device", "cpu"] if script == "gpu_suite" else []
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--out", str(stem), *device])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    page = stem.with_suffix(".md").read_text()
    for figure in re.findall(r"\]\((.*?)\)", page):
        Image.open(stem.parent / figure).verify()
    assert "**Failed**" not in page
    assert json.loads(stem.with_suffix(".json").read_text())["rows"]


@pytest.mark.usefixtures("_benchmarks")
def test_a_suite_reports_what_failed_and_goes_on(tmp_path):
    from suite import Suite

    from sd_hyena.errors import SdHyenaError

    suite = Suite(str(tmp_path / "s"), "title", "command", "cpu", torch.float32, print)

    def fail():
        raise SdHyenaError("off by 1")

    suite.section("first", fail)
    suite.section("second", lambda: "fine\n")
    assert suite.failures == ["first: SdHyenaError: off by 1"]
    page = (tmp_path / "s.md").read_text()
    assert "**Failed**: SdHyenaError: off by 1" in page
    assert "fine" in page


@pytest.mark.usefixtures("_benchmarks")
def test_the_gpu_suite_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_suite.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "no usable CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("_benchmarks")
def test_the_gpu_suite_knows_its_sections(monkeypatch, tmp_path, capsys):
    command = ["gpu_suite", "--device", "cpu", "--quick", "--only", "kinds,charts", "--out", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_suite.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "no section charts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
