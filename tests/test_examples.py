"""The examples do what they say, in a few steps on the bundled model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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
    assert (folder / "evaluation" / "report.md").is_file() or list((folder / "evaluation").iterdir())
    assert len({(folder / "pictures" / f"{h}_000.png").read_bytes() for h in range(4)}) == 4


def test_the_python_api(run):
    folder, run = run
    run(sys.executable, EXAMPLES / "python_api.py", folder / "together" / "Hyena-00002.safetensors", folder / "python")
    pictures = {name: Image.open(folder / "python" / f"{name}.png").tobytes() for name in ("hyena", "attention")}
    assert pictures["hyena"] != pictures["attention"]
    assert (folder / "python" / "layers" / "hyena.safetensors").is_file()
