"""What is imported where only some packages are there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sd_hyena import cli
from sd_hyena.extras import EXTRAS

ROOT = Path(__file__).parent.parent
CORE = {"torch", "safetensors", "numpy"}  # numpy is torch's own wish
OTHERS = {"diffusers", "transformers", "accelerate", "huggingface_hub", "PIL", "rich", "psutil", "filelock"}
OF_EXTRAS = {module for modules in EXTRAS.values() for module in modules} | {"tomesd", "torchmetrics"}
WITHOUT = """
import sys
from importlib.machinery import PathFinder

def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] in {missing!r} else find(name, path, target)

PathFinder.find_spec = find_spec
"""


def run_without(missing, code):
    code = WITHOUT.format(missing=missing) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_operators_files_and_hosts_need_torch_and_safetensors_alone():
    code = """
import sd_hyena
from sd_hyena import checkpoint, nn
from sd_hyena.hosts import comfy
file = checkpoint.load("demo")
names = [name for name, layer in file.layers.items() if layer.config.form == "full"]
operator = file.build(names[0])
import torch
print(operator(torch.randn(1, 12, operator.dim), (3, 4)).shape)
print(sorted(set(module.partition(".")[0] for module in sys.modules) & set(%r)))
"""
    done = run_without(OTHERS | OF_EXTRAS, code % sorted(OTHERS | OF_EXTRAS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([1, 12, 64])", "[]"]


def test_pictures_are_drawn_without_any_extra(tmp_path):
    words = ["generate", "-m", "demo", "-y", "demo", "-p", "a fox", "-n", "1", "-s", "2", "-W", "64", "-H", "64"]
    code = f"from sd_hyena.cli import main\nsys.exit(main({[*words, '-o', str(tmp_path)]!r}))"
    done = run_without(OF_EXTRAS, code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image_000.png").is_file()


@pytest.mark.parametrize("command", list(cli.NEEDS))
def test_commands_say_what_they_need(command, monkeypatch, capsys, tmp_path):
    (module, *_) = EXTRAS[cli.NEEDS[command][0]]
    monkeypatch.setitem(sys.modules, module, None)
    words = {"benchmark": ["layer"], "demo": ["--out_dir", str(tmp_path / "out")], "evaluate": ["-y", "demo"]}
    assert cli.main([command, *words.get(command, ())]) == 1
    line = f"sd-hyena: sd-hyena {command} needs {module}: pip install 'sd-hyena[{cli.NEEDS[command][0]}]'\n"
    assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra: {line.split(">")[0] for line in lines} for extra, lines in project["optional-dependencies"].items()}
    for extra, modules in EXTRAS.items():
        assert set(modules) <= named[extra]
        for module in modules:
            assert not any(line.startswith(module) for line in project["dependencies"])
    everything = "".join(named["all"])
    assert all(extra in everything for extra in EXTRAS)
