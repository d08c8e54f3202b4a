"""Offload and tiles: the same pictures from less memory, and chosen by what there is."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from sd_hyena import checkpoint
from sd_hyena.cli import main
from sd_hyena.errors import UsageError
from sd_hyena.generate import memory
from sd_hyena.generate.draw import draw_sweep
from sd_hyena.generate.memory import place, spare_vae
from sd_hyena.generate.settings import GenerateSettings
from sd_hyena.generate.stages import Stage, stages
from sd_hyena.models import DEMO, load_pipeline, locate
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets

GIB = 2**30


@pytest.fixture
def student(tmp_path):
    target = find_targets(load_pipeline(locate(DEMO)).unet)["IN01"]
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "a.safetensors", {"IN01": build(OperatorConfig(target.dim, 8, 8, attention_heads=2))})
    return tmp_path / "a.safetensors"


@pytest.mark.compatibility(
    "High resolution", "`--offload model`, `--offload sequential`", "same pixels, with --hires and --hyena_range"
)
def test_offload_with_all_that_switches(tmp_path, student):
    """By Accelerate's hooks, with the CPU in the accelerator's place."""
    pictures = {}
    for offload in ("none", "model", "sequential"):
        settings = GenerateSettings(
            DEMO, "a red apple", f"{student},", width=64, height=64, num_images=1, steps=4, hires="128x128",
            hires_strength=0.5, hires_hyena="both", hyena_range="0.5-1", out_dir=str(tmp_path / offload), seed=7,
        )  # fmt: skip
        settings.validate()
        pipe = load_pipeline(locate(DEMO))
        # diffusers' own calls the device cpu:0, which Accelerate takes for another one than cpu
        pipe.enable_sequential_cpu_offload = lambda device, pipe=pipe: [
            cpu_offload(module, torch.device(device))
            for module in pipe.components.values()
            if isinstance(module, torch.nn.Module)
        ]
        assert place(pipe, "cpu", offload, stages(settings), 1) == offload
        hooked = [name for name, m in pipe.unet.named_modules() if hasattr(m, "_hf_hook")]
        assert len(hooked) == {"none": 0, "model": 1}.get(offload, len(hooked))
        assert (offload == "sequential") == all(p.is_meta for p in pipe.unet.parameters())
        pictures[offload] = [np.asarray(drawn.image, int) for drawn in draw_sweep(pipe, settings, 7, "")]
    for offload in ("model", "sequential"):
        assert np.abs(np.subtract(pictures["none"], pictures[offload])).max() <= 1
    assert (pictures["none"][0] != pictures["none"][1]).any()


def stub(unet_gib, text_gib, vae=None):
    """A pipeline of which the weights alone are known."""
    with torch.device("meta"):
        unet, text = (torch.nn.Linear(int(n * GIB) // 4, 1, bias=False) for n in (unet_gib, text_gib))
    unet.config, unet.dtype = SimpleNamespace(block_out_channels=(320,)), torch.float16
    pipe = SimpleNamespace(
        components={"unet": unet, "text_encoder": text}, unet=unet, vae=vae, vae_scale_factor=8, calls=[]
    )
    pipe.to = lambda device: pipe.calls.append(("to", device))
    pipe.enable_model_cpu_offload = lambda device: pipe.calls.append(("model", device))
    pipe.enable_sequential_cpu_offload = lambda device: pipe.calls.append(("sequential", device))
    return pipe


@pytest.mark.parametrize(
    ("free", "count", "chosen"), [(12, 1, "none"), (8, 1, "model"), (3, 1, "sequential"), (12, 4, "model")]
)
def test_offload_by_what_memory_there_is(monkeypatch, caplog, free, count, chosen):
    caplog.set_level(logging.INFO, "sd_hyena")
    monkeypatch.setattr(memory, "free_memory", lambda device: free * GIB)
    stage = Stage("native", 1024, 1024, 30, 30, 1.0, True)
    pipe = stub(4, 2)
    assert place(pipe, "cuda:0", "auto", [stage], count) == chosen
    assert pipe.calls == [({"none": "to"}.get(chosen, chosen), "cuda:0")]
    assert (f"(--offload {chosen})" in caplog.text) == (chosen != "none")
    assert place(stub(4, 2), "cpu", "auto", [stage], count) == "none"


def generate(folder, *options):
    size = ["-W", "320", "-H", "64", "-s", "1", "-k", "7", "-n", "1", "-o", str(folder)]
    assert main(["generate", "-m", "demo", "-p", "a red apple on a table", *size, *options]) == 0
    return Image.open(folder / "image_000.png")


@pytest.mark.compatibility(
    "High resolution", "VAE tiling and slicing", "by memory, or `--vae_tiling on`; the PNG says so"
)
def test_tiles(tmp_path, monkeypatch, caplog):
    whole, told = generate(tmp_path / "whole"), generate(tmp_path / "on", "--vae_tiling", "on")
    assert "the VAE works in tiles of 256 px" in caplog.text
    assert "VAE tiles: 256 px" in told.text["parameters"]
    assert "VAE tiles" not in whole.text["parameters"]
    error = np.square(np.asarray(whole, float) - np.asarray(told, float)).mean()
    assert 0 < error < 255**2 * 1e-3  # 30 dB
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    for option, tiled in (("auto", True), ("off", False)):
        caplog.clear()
        other = generate(tmp_path / option, "--vae_tiling", option)
        assert ("the VAE works in tiles" in caplog.text) == tiled
        assert (np.asarray(other) == np.asarray(told if tiled else whole)).all()


def test_the_vae_is_spared_as_far_as_needed(pipe, monkeypatch):
    one = memory._vae_bytes(pipe, Stage("native", 512, 512, 1, 1, 1.0, True))
    for free, size, count, expected in (
        (10 * one, 512, 4, (False, False)),
        (2 * one, 512, 4, (False, True)),
        (one, 512, 1, (True, True)),
        (one, 256, 1, (False, False)),
        (one // 8, 256, 1, (False, True)),  # one tile already
    ):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        spare_vae(pipe, "cpu", "auto", [Stage("native", size, size, 1, 1, 1.0, True)], count)
        assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == expected
        pipe.vae.disable_tiling()
        pipe.vae.disable_slicing()


def test_a_vae_that_knows_no_tiles():
    drawn = [Stage("native", 512, 512, 1, 1, 1.0, True)]
    other = SimpleNamespace(vae=torch.nn.Identity())
    spare_vae(other, "cpu", "auto", drawn, 1)
    with pytest.raises(UsageError, match="--vae_tiling on: Identity does not work in tiles"):
        spare_vae(other, "cpu", "on", drawn, 1)
