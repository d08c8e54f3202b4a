"""Nothing goes to the network unless a hub id is given, nor does any library report its use."""

import os
import shlex
import subprocess
import sys

import pytest

from sd_hyena.cli import main
from sd_hyena.sources import STUDENT_FILE

SIZE = "-W 64 -H 64"
COMMANDS = (
    f"train -m demo {SIZE} -t IN01 -b 1 -n 1 --n_images 1 --n_held_out 1 --draw_steps 1 -o out -l logs",
    "prepare -m demo --sizes 64x64 -n 1 --n_held_out 1 --draw_steps 1 -o data",
    f"generate -m demo {SIZE} -y demo -p x -n 1 -s 1 -o out",
    f"evaluate -m demo {SIZE} -y demo -n 1 -s 1 --layer_samples 0 --no_yardstick",
    "benchmark layer --kinds linear-elu -W 64 --repeats 1",
    "benchmark sizes --kinds linear-elu --widths 64 --repeats 1",
    f"benchmark image -m demo {SIZE} -y demo -s 1 -n 1 --repeats 1",
    f"anatomy -m demo {SIZE} -t IN01 -n 1 -s 1 --samples 1 --bands 1",
    "info demo",
    "targets -m demo",
    f"convert {STUDENT_FILE} -t IN01 --out 1.safetensors",
    f"merge {STUDENT_FILE} {STUDENT_FILE} --prefer first --out both.safetensors",
)


@pytest.mark.reliability(18)
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition("-")[0].strip())
def test_commands_need_no_network(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0


PATHS = (
    "./owner/name",
    "../owner/name",
    "~/owner/name",
    "/owner/name",
    "owner\\name",
    "owner/name/",
    "owner/name/more",
    "owner/name.safetensors",
    "owner/name.ckpt",
    "owner/name.PT",
    "out/step-100",
    "file://owner/name",
)


@pytest.mark.reliability(18)
@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch, capsys, no_network, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for command in (
        ["info", path],
        ["generate", "-m", path, "-p", "x"],
        ["evaluate", "-m", "demo", "-y", "demo", "--clip_model", path],
        ["prepare", "-m", path, "-o", "data"],
    ):
        assert main(command) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1
    assert not no_network


@pytest.mark.reliability(18)
@pytest.mark.parametrize("command", [["info", "owner/name"], ["generate", "-m", "owner/name", "-p", "x"]])
def test_a_hub_id_is_looked_for(capsys, no_network, command):
    assert main(command) == 1
    assert no_network, "what blocks the network does not notice that it is tried"
    no_network.clear()


def test_libraries_report_nothing():
    """They read the environment when they are imported: a process of its own, where nothing is set yet. What diffusers
    and transformers report they leave to the hub's client."""
    code = "import sd_hyena, huggingface_hub.constants as hub; assert hub.HF_HUB_DISABLE_TELEMETRY"
    words = ("TELEMETRY", "DO_NOT_TRACK", "ANALYTICS")
    clean = {name: value for name, value in os.environ.items() if not any(word in name for word in words)}
    subprocess.run([sys.executable, "-c", code], env=clean, check=True)
