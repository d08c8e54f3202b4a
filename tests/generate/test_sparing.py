"""Drawing goes on with less memory where it runs out: the same pictures, and the pipeline as it was afterwards."""

import weakref

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from out_of_memory import CPU, ERRORS, fail
from PIL import Image

from sd_hyena import patch
from sd_hyena.cli import main
from sd_hyena.errors import OutOfMemory, SdHyenaError, is_out_of_memory
from sd_hyena.generate import sparing
from sd_hyena.generate.sampling import sample_latents
from sd_hyena.generate.sparing import Sparing
from sd_hyena.generate.switching import hyena_range
from sd_hyena.machine import Batches
from sd_hyena.models import load_pipeline, locate
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets

LINES = [
    "one picture at a time",
    "attention in slices",
    "the VAE in tiles of 64 px",
    "weights in main memory (--offload model)",
    "whole attention, as slices did not help",
]
OPTIONS = {"width": 96, "height": 64, "num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def small(_folders):
    """A thin pipeline whose first layer is a Hyena layer."""
    pipe = load_pipeline(locate(str(_folders("sd15"))))
    pipe.set_progress_bar_config(disable=True)
    target = find_targets(pipe.unet)["IN01"]
    torch.manual_seed(0)
    patch.attach(pipe.unet, {"IN01": build(OperatorConfig(target.dim, 8, 12, attention_heads=target.heads))})
    return pipe


@pytest.fixture(scope="module")
def unhurried(small):
    return draw(small)


def draw(pipe, *args):
    images, latents = sample_latents(pipe, ["a fox", "a house"], [1, 2], *args, **OPTIONS)
    return np.stack([np.asarray(image, int) for image in images]), latents


def state(pipe):
    hooked = [hasattr(module, "_hf_hook") for module in pipe.unet.modules()]
    vae = pipe.vae.use_tiling, pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size
    return list(pipe.unet.attn_processors.values()), vae, hooked, list(patch.attached(pipe.unet))


def said(caplog):
    prefix, suffix = "out of memory: drawing again with ", ", from here on"
    return [line.removeprefix(prefix).removesuffix(suffix) for line in caplog.messages if line.startswith(prefix)]


@pytest.mark.reliability(14)
@pytest.mark.parametrize(("failures", "kind"), [(1, "cpu"), (3, "gpu"), (5, "python")])
def test_pictures_are_drawn_again_with_less(small, unhurried, monkeypatch, caplog, failures, kind):
    """Every first attempt ends in the middle of its steps."""
    monkeypatch.setattr(sparing, "_has_own_memory", lambda device: True)  # the CPU in a GPU's place
    before, sliced = state(small), []
    with monkeypatch.context() as patched, Sparing(small) as spare:
        failed = fail(patched, small.unet, "forward", lambda n, *_, **__: n % 2 and sum(failed) < failures, kind)
        images, latents = draw(small, spare)
        assert said(caplog) == LINES[:failures]
        handle = small.unet.register_forward_pre_hook(
            lambda unet, _: sliced.extend(type(p).__name__ for p in unet.attn_processors.values())
        )
        assert (draw(small, spare)[0] == images).all()  # and stays so, without a word
        handle.remove()
        assert said(caplog) == LINES[:failures]
        assert ("SlicedAttnProcessor" in sliced) == (failures == 3)
        assert small.vae.use_tiling == (failures >= 3)
        assert hasattr(small.vae, "_hf_hook") == (failures >= 4)
    torch.testing.assert_close(latents, unhurried[1], rtol=1e-4, atol=1e-4)
    if failures < 3:
        assert np.abs(images - unhurried[0]).max() <= 1
    assert state(small) == before


@pytest.mark.reliability(14)
def test_where_nothing_helps_one_line_says_what_to_lower(small, monkeypatch, caplog):
    before = state(small)
    fail(monkeypatch, small.vae, "decode")
    with pytest.raises(OutOfMemory, match=r"a single picture 96 px long: lower --width and --height, or --hires$"):
        draw(small)
    assert said(caplog) == [LINES[0], LINES[1], LINES[2], LINES[4]]  # on a CPU weights are in main memory anyway
    assert state(small) == before


@pytest.mark.reliability(14)
def test_other_errors_and_other_processors_are_left_alone(small, monkeypatch, caplog):
    class Own(AttnProcessor2_0):
        pass

    attention = small.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    before, own = attention.get_processor(), Own()
    attention.set_processor(own)
    seen = []
    handle = attention.register_forward_pre_hook(lambda module, _: seen.append(module.get_processor()))
    with monkeypatch.context() as patched:
        failed = fail(patched, small.unet, "forward", lambda n, *_, **__: sum(failed) < 2)
        draw(small)
        assert LINES[1] in said(caplog)
        assert set(seen) == {own}
    handle.remove()
    attention.set_processor(before)
    monkeypatch.setattr(small.unet, "forward", lambda *_, **__: {}["a mistake"])
    with pytest.raises(KeyError, match="a mistake"):
        draw(small)


@pytest.mark.reliability(14)
def test_a_picture_that_broke_off_does_not_shift_the_range_of_the_next(small, monkeypatch):
    seen = []
    fail(monkeypatch, small.unet, "forward", lambda n, *_, **__: n == 2)
    with hyena_range(small, 0.5, 1.0):
        handle = small.unet.register_forward_pre_hook(lambda unet, _: seen.append(patch.attached(unet)["IN01"].enabled))
        sample_latents(small, ["a fox"], [1], **(OPTIONS | {"num_inference_steps": 4}))
    handle.remove()
    assert seen == [False] * 3 + [False] * 3 + [True] * 2  # this sampler looks five times in four steps


@pytest.mark.reliability(14)
def test_generate_keeps_to_what_helped(saved_folder, tmp_path, monkeypatch, capsys):
    folder = saved_folder("sd15")
    command = ["generate", "-m", str(folder), "-p", "a fox", "-W", "96", "-H", "64", "-s", "1", "-n", "2", "-i", "2",
               "-k", "7", "-o"]  # fmt: skip
    failed = fail(monkeypatch, UNet2DConditionModel, "forward", lambda n, *_, **__: sum(failed) < 3)
    assert main([*command, str(tmp_path / "out")]) == 0
    errors = capsys.readouterr().err
    assert [errors.count(line) for line in LINES[:3]] == [1, 1, 1]
    assert "VAE tiles: 64 px" in Image.open(tmp_path / "out" / "image_003.png").text["parameters"]
    fail(monkeypatch, UNet2DConditionModel, "forward")
    assert main([*command, str(tmp_path / "none")]) == 1
    assert "lower --width and --height" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "none").glob("*"))


@pytest.mark.reliability(14)
def test_what_counts_as_out_of_memory():
    assert all(is_out_of_memory(make()) for make in ERRORS.values())
    for text in ("CUDA error: out of memory", "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
                 "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "std::bad_alloc"):  # fmt: skip
        assert is_out_of_memory(RuntimeError(text))
    for error in (None, RuntimeError("size mismatch"), ValueError("out of memory"), SdHyenaError("out of memory")):
        assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught:  # as this machine's PyTorch says it
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.reliability(14)
def test_a_failed_attempt_holds_nothing_when_the_next_begins():
    alive = []

    def work(items):
        held = torch.zeros(1000)
        alive.append(weakref.ref(held))
        assert all(ref() is None for ref in alive[:-1])
        if len(items) > 1:
            raise RuntimeError(CPU)
        return items[0] + held.sum().item()

    assert Batches(5, "in a test", "nothing").run(work, range(3)) == [0, 1, 2]
    assert len(alive) == 2 + 3  # 3 and 2 at a time were too many
