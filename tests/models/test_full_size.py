"""A Stable Diffusion 1.5 of its true size with random weights, where ``SD_HYENA_FULL_SIZE=1`` asks for it.

It writes 6 GB to the temporary folder, takes 8 GB of memory and a few minutes.
"""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from demo import ldm_export
from PIL import Image

from sd_hyena.families import FAMILIES

pytestmark = [
    pytest.mark.skipif("SD_HYENA_FULL_SIZE" not in os.environ, reason="SD_HYENA_FULL_SIZE is not set"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "sd15.safetensors"
    ldm_export.write(FAMILIES["sd15"], path, torch.float16)
    assert path.stat().st_size > 2e9
    return path


# Of its own memory: what the system tells of children counts what their parent held when it began them.
MEASURED = """
import sys
from sd_hyena.cli import main
status = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(status)
"""


def run(*words):
    subprocess.run([sys.executable, "-m", "sd_hyena", *map(str, words)], check=True)


def test_training_from_noise_is_light(file, tmp_path):
    options = ["-t", "IN01", "--data", "noise", "-n", 2, "-W", 64, "-H", 64]
    words = ["train", "-m", file, *options, "-o", tmp_path / "out", "-l", tmp_path / "logs"]
    began = time.time()
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, words)], check=True, stdout=subprocess.PIPE)
    peak = int(done.stdout.split()[-1]) / 2**20  # KiB to GiB
    print(f"{time.time() - began:.1f} s, {peak:.2f} GiB")
    assert peak < 2


def test_file_and_folder_draw_the_same(file, tmp_path):
    from sd_hyena.models import load_pipeline, locate

    load_pipeline(locate(str(file)), dtype=torch.float16).save_pretrained(tmp_path / "folder")
    for name, model in (("file", file), ("folder", tmp_path / "folder")):
        options = ["-p", "a fox", "-s", 1, "-W", 256, "-H", 256, "-n", 1, "-k", 1]
        run("generate", "-m", model, *options, "-o", tmp_path / name)
    pixels = [np.asarray(Image.open(tmp_path / name / "image_000.png")) for name in ("file", "folder")]
    assert np.array_equal(*pixels)
    assert pixels[0].std() > 1
