"""Every command and piece of Python in README and docs runs, in their order: on a thin model, few steps, 64 px."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hosts import comfy_stand_in as stand_in
from test_docs import PAGES

from sd_hyena import cli, models
from sd_hyena.cli import ui
from sd_hyena.distill import trainer

SMALL = "-W 64 -H 64"
# What makes a command short; the last of an option's values counts.
SHORT = {
    "anatomy": f"{SMALL} --bands 1 --samples 1 -n 1 -s 2",
    "train": f"{SMALL} -n 2 --finetune_steps 0 -b 2 --n_images 2 --n_held_out 2 -s 0 -d 1",
    "evaluate": f"{SMALL} -n 1 -s 2 --layer_samples 1",
    "generate": f"{SMALL} -n 1 -s 2",
    "prepare": "-n 2 --n_held_out 1 --draw_steps 2 --sizes 64x64",
    "benchmark layer": f"{SMALL} --repeats 1 --budget 0.1 --dim 16 --heads 2",
    "benchmark sizes": "--widths 64,128 --repeats 1 --budget 0.1 --dim 16 --heads 2",
    "benchmark image": f"{SMALL} -s 1 --repeats 1",
}


@pytest.fixture
def folder(tmp_path, monkeypatch, thin_model):
    """Where a reader stands who has a model, and a student of the bundled one."""
    shutil.copy(thin_model("sd15").path, tmp_path / "model.safetensors")
    shutil.copy(models.DEMO_DIR.parent / "student.safetensors", tmp_path / "hyena.safetensors")
    (tmp_path / "out" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "VALIDATION_SAMPLES", 8)
    monkeypatch.setattr(ui, "_serve", lambda *args: 0)
    return tmp_path


def commands(code):
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["sd-hyena"]:
            yield words[1:]


def shortened(words):
    name = " ".join(words[:2]) if words[0] == "benchmark" else words[0]
    if "--hires" in words:
        return [*words, "-s", "5", "--hires", "288x288" if "demo" in words else "576x576"]
    return [*words, *SHORT.get(name, "").split()]


SLOW = dict.fromkeys(("commands.md", "results.md"), pytest.mark.nightly)
WITH_CODE = [
    pytest.param(page, id=page.name, marks=SLOW.get(page.name, ()))
    for page in PAGES
    if re.search("```(bash|python)", page.read_text())
]


@pytest.mark.parametrize("page", WITH_CODE)
def test_snippets_run(page, folder, monkeypatch):
    text = page.read_text()
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            names = {"model": comfy_model(monkeypatch, folder)} if "comfy" in code else in_python(text)
            with monkeypatch.context() as patch:
                patch.setattr(StableDiffusionPipeline, "__call__", drawing_little)
                exec(code, names)
            continue
        for words in commands(code):
            assert cli.main(shortened(words)) == 0, words
            if words[0] == "train":
                out = Path(words[words.index("-o") + 1])
                for name in set(re.findall(r"Hyena-\d{5}", text)):
                    shutil.copy(out / "Hyena-00002.safetensors", out / f"{name}.safetensors")


def drawing_little(pipe, *args, whole=StableDiffusionPipeline.__call__, **options):
    return whole(pipe, *args, **options | {"num_inference_steps": 2, "height": 64, "width": 64})


def in_python(text):
    """What a snippet may speak of: a pipeline of the model that the page trains on, and tokens for IN01."""
    source = "demo" if "train -m demo" in text else "model.safetensors"
    return {"pipe": models.load_pipeline(models.locate(source)), "x": torch.randn(2, 15 * 9, 64), "h": 15, "w": 9}


def comfy_model(monkeypatch, folder):
    """The bundled model as a stand-in of ComfyUI's loader gives it."""
    stand_in.install(monkeypatch, folder)
    unet = models.load_pipeline(models.locate("demo")).unet
    return stand_in.ModelPatcher(stand_in.BaseModel(stand_in.UNetModel(unet).eval()), "cpu", "cpu")
