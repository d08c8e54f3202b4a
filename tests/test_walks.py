"""Adding an operator is one file and one line of the registry: everything else follows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sd_hyena
from sd_hyena.checkpoint import load

ROOT = Path(sd_hyena.__file__).parent
OPERATOR = '''
"""Every token says the mean of its row of the grid."""

from .operator import Linear, Operator, copy_linear
from .teacher import projections_of


class RowMean(Operator):
    def __init__(self, config):
        super().__init__(config)
        self.in_proj, self.out_proj = Linear(config.dim, config.inner), Linear(config.inner, config.dim)

    def run(self, x, size, projections):
        v = self.in_proj(x).unflatten(1, size)
        return self.out_proj(v.mean(2, keepdim=True).expand_as(v).flatten(1, 2))

    def reference(self, x, size, tokens, projections):
        return self.run(x, size, projections)[:, tokens]

    def start_from(self, attention, records):
        layers = projections_of(attention).layers
        copy_linear(self.in_proj, slice(None), layers[2])
        copy_linear(self.out_proj, slice(None), layers[3])
'''
COMMANDS = """
train -m demo -t IN01,OUT11 --operator rows -n 3 -b 8 -W 64 -H 64 --n_images 4 --n_held_out 2 --draw_steps 2 -o out
generate -m demo -p "a red cat" -y out/Hyena-00003.safetensors -W 64 -H 64 -s 2 -o pictures
evaluate -m demo -y out/Hyena-00003.safetensors -n 1 -W 64 -H 64 -s 2 --layer_samples 1 --no_yardstick -o report
benchmark layer --kinds rows,sdp-math -W 64 -H 64 -b 1 --dim 16 --heads 2 --repeats 1 --out layer
benchmark image -m demo --operator rows -t high -W 64 -H 64 -s 1 --repeats 1
convert out/Hyena-00003.safetensors -t OUT11 --dtype float16 -o folder
info folder
"""


def test_an_operator_is_one_file_and_one_line(tmp_path):
    package = tmp_path / "sd_hyena"
    shutil.copytree(ROOT, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "nn" / "rows.py").write_text(OPERATOR)
    config = package / "config.py"
    text = config.read_text()
    assert text.count("OPERATORS = {\n") == 1
    config.write_text(
        text.replace("OPERATORS = {\n", 'OPERATORS = {\n    "rows": Entry("rows:RowMean", (), "means"),\n')
    )
    script = (
        "import shlex, sys; from sd_hyena.cli import main; import sd_hyena; print(sd_hyena.__file__)\n"
        f"for line in {COMMANDS.strip().splitlines()!r}:\n"
        "    status = main(shlex.split(line))\n"
        "    assert status == 0, (line, status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(package) in done.stdout
    file = tmp_path / "out" / "Hyena-00003.safetensors"
    assert b'"operator": "rows"' in file.read_bytes().replace(b'\\"', b'"')
    assert (tmp_path / "pictures" / "image_000.png").is_file()
    assert "OUT11" in (tmp_path / "report" / "evaluation.md").read_text()
    rows = {row["kind"]: row for row in json.loads((tmp_path / "layer.json").read_text())["rows"]}
    assert rows["rows"]["error"] < 1e-5
    with pytest.raises(sd_hyena.CheckpointError, match="operator must be one of"):  # here nobody knows it
        load(file)
