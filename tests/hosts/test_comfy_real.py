"""The host adapter in a real ComfyUI, of which COMFYUI_DIR names a tree."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TREE = os.environ.get("COMFYUI_DIR", "")
NEEDED = ("einops", "scipy", "torchsde")  # of ComfyUI, beyond what is installed here


@pytest.mark.skipif(not TREE, reason="COMFYUI_DIR names no tree of ComfyUI")
def test_everything_holds_in_a_real_comfyui(tmp_path):
    missing = [module for module in NEEDED if find_spec(module) is None]
    assert not missing, f"ComfyUI needs {', '.join(missing)} too: pip install {' '.join(missing)}"
    tests = Path(__file__).parents[1]
    words = [
        str(Path(TREE).resolve()),
        str(tmp_path),
        *(["--full-size"] if os.environ.get("SD_HYENA_FULL_SIZE") else []),
    ]
    done = subprocess.run(
        [sys.executable, str(tests / "hosts" / "comfy_real.py"), *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
        capture_output=True,
        text=True,
        timeout=290,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAILED "))]
    assert len(lines) >= 12
    assert not [line for line in lines if line.startswith("FAILED")]
