"""The examples do what they say, in a few steps on the bundled model."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from sd_hyena import models
from sd_hyena.cli import main
from sd_hyena.families import FAMILIES

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = {
    "LAYERS": "IN01 OUT11",
    "SIZE": "64",
    "STEPS": "2",
    "BATCH": "2",
    "IMAGES": "2",
    "HELD_OUT": "2",
    "DRAW": "2",
    "COUNT": "1",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(example)``: what a script tells sd-hyena, done here, where everything is imported already."""
    folder = tmp_path_factory.mktemp("examples")
    command = folder / "bin" / "sd-hyena"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >>told\necho >>told\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(example):
        (folder / "told").write_text("")
        environment = os.environ | FEW | {"OUT": str(folder), "PATH": path}
        subprocess.run(["bash", EXAMPLES / example], cwd=folder, env=environment, check=True, timeout=60)
        for line in (folder / "told").read_text().splitlines():
            assert main(line.split("\0")[:-1]) == 0, line

    run("train.sh")
    return folder, run


def test_what_was_taught_is_drawn_and_measured(run):
    folder, run = run
    run("generate.sh")
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert names == {"grid.png", *(f"{h}_000.png" for h in range(4))}
    assert "<h1>demo: teacher against noise</h1>" in (folder / "evaluation" / "report.html").read_text()
    lines = (folder / "evaluation" / "evaluation.md").read_text().splitlines()
    rows = json.loads((folder / "evaluation" / "evaluation.json").read_text())["rows"]
    for label in ("noise", "Hyena-00002"):
        assert any(line.startswith(f"| {label} |") for line in lines)
        assert sum(row["label"] == label for row in rows) == 1
    assert len({(folder / "pictures" / f"{h}_000.png").read_bytes() for h in range(4)}) == 4


def test_layers_are_the_models_own(tmp_path, capsys, monkeypatch):
    """Of SDXL, whose layers are named otherwise; a stand-in for sd-hyena writes down what it is told."""

    def skeleton(source):
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(FAMILIES["sdxl"].config("unet"))

    monkeypatch.setattr(models, "unet_skeleton", skeleton)
    assert main(["targets", "-m", "demo", "--json"]) == 0
    (tmp_path / "targets.json").write_text(capsys.readouterr().out)
    command = tmp_path / "sd-hyena"
    command.write_text('#!/bin/sh\nif [ "$1" = targets ]; then cat targets.json; else echo "$*" >>told; fi\n')
    command.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def told(example, **more):
        (tmp_path / "told").write_text("")
        environment = os.environ | {"PATH": path, "MODEL": "sdxl.safetensors"} | more
        status = subprocess.run(["bash", EXAMPLES / example], cwd=tmp_path, env=environment, timeout=60).returncode
        return status, [line.split() for line in (tmp_path / "told").read_text().splitlines()]

    def taught(**more):
        status, commands = told("train.sh", **more)
        return status, [words[words.index("-t") + 1] for words in commands]

    high = [f"{block}.{k}" for block in ("IN04", "IN05", "OUT03", "OUT04", "OUT05") for k in (0, 1)]
    assert taught() == (0, [*high, "high", "high"])
    assert taught(LAYERS="M00.3") == (0, ["M00.3", "high", "high"])
    for name in high:
        (tmp_path / "out" / "noise" / name).mkdir(parents=True)
        (tmp_path / "out" / "noise" / name / "Hyena-00160.safetensors").touch()
    status, (drawn, merged, measured) = told("generate.sh", PROMPTS="prompts.txt")
    one, two = (f"out/noise/{name}/Hyena-00160.safetensors" for name in (high[0], high[-1]))
    assert status == 0
    assert f",{one},{one}+{two},out/together/Hyena-00160.safetensors" in drawn
    assert len(merged) == 1 + len(high) + 2
    assert measured[measured.index("--prompts") + 1] == "prompts.txt"
    (tmp_path / "targets.json").write_text("")
    status, layers = taught()
    assert status != 0
    assert not layers


def test_the_python_api(run, monkeypatch):
    folder, _ = run
    whole = StableDiffusionPipeline.__call__
    few = {"num_inference_steps": 2, "height": 64, "width": 64}
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda self, *args, **more: whole(self, *args, **more | few)
    )
    words = ["python_api.py", folder / "together" / "Hyena-00002.safetensors", folder / "python"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    runpy.run_path(str(EXAMPLES / "python_api.py"))
    pictures = {path.name: Image.open(path).tobytes() for path in (folder / "python").glob("*.png")}
    assert len(pictures) == len(set(pictures.values())) == 3
    assert (folder / "python" / "layers" / "hyena.safetensors").is_file()
