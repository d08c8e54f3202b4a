"""The examples do what they say, in a few steps on the bundled model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
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
    folder = tmp_path_factory.mktemp("examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(*command):
        environment = os.environ | FEW | {"OUT": str(folder), "PATH": path}
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=280)

    run("bash", EXAMPLES / "train.sh")
    return folder, run


def test_what_was_taught_is_drawn_and_measured(run):
    folder, run = run
    run("bash", EXAMPLES / "generate.sh")
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
    status, (drawn, merged, measured) = told("generate.sh", PROMPT="a fox")
    one, two = (f"out/noise/{name}/Hyena-00160.safetensors" for name in (high[0], high[-1]))
    assert status == 0
    assert f",{one},{one}+{two},out/together/Hyena-00160.safetensors" in drawn
    assert len(merged) == 1 + len(high) + 2
    assert measured[measured.index("--prompts") + 1] == "out/prompt.txt"
    assert (tmp_path / "out" / "prompt.txt").read_text() == "a fox\n"
    (tmp_path / "targets.json").write_text("")
    status, layers = taught()
    assert status != 0
    assert not layers


def test_the_python_api(run):
    folder, run = run
    run(sys.executable, EXAMPLES / "python_api.py", folder / "together" / "Hyena-00002.safetensors", folder / "python")
    pictures = {name: Image.open(folder / "python" / f"{name}.png").tobytes() for name in ("hyena", "attention")}
    assert pictures["hyena"] != pictures["attention"]
    assert (folder / "python" / "layers" / "hyena.safetensors").is_file()
