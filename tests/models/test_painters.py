"""Inpainting models and SDXL's refiner, which paint over pictures: taught, measured and looked at like the others."""

import pytest
import torch
from PIL import Image

from sd_hyena import cli
from sd_hyena.families import encode_prompt, from_text, unet_call
from sd_hyena.models import load_pipeline, locate


@pytest.mark.compatibility("Models", "inpainting models: train, generate", "work, painting over grey")
def test_layers_of_models_that_paint_are_taught_and_drawn_with(thin_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["-m", thin_model("sd15_inpainting").path, "-W", 64, "-H", 64, "--device", "cpu"]
    train = ["train", *model, "-t", "IN02", "-n", 1, "-b", 1, "--n_images", 1, "--n_held_out", 1, "--draw_steps", 1]
    assert cli.main([str(word) for word in (*train, "--block", 0)]) == 0
    draw = ["generate", *model, "-p", "x", "-y", "out/Hyena-00001.safetensors", "-s", 1, "-n", 2, "-o", "pictures"]
    assert cli.main([str(word) for word in draw]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


@pytest.mark.compatibility("Models", "SDXL's refiner: generate", "works, painting over grey")
def test_the_refiner_draws_from_text(thin_model, tmp_path):
    model = ["-m", thin_model("sdxl_refiner").path, "-W", 64, "-H", 128, "--device", "cpu"]
    assert cli.main([str(word) for word in ("generate", *model, "-p", "x", "-s", 1, "-n", 1, "-o", tmp_path)]) == 0
    assert Image.open(tmp_path / "image_000.png").size == (64, 128)


def test_an_inpainting_unet_sees_a_mask_over_all_and_grey_around_it(thin_model):
    pipe = load_pipeline(locate(str(thin_model("sd15_inpainting").path)))
    call = unet_call(pipe, torch.randn(2, 4, 8, 6), torch.tensor([1, 2]), encode_prompt(pipe, "x")[0].expand(2, -1, -1))
    mask, seen = call["sample"][:, 4:5], call["sample"][:, 5:]
    assert (mask == 1).all()
    grey = pipe.vae.encode(torch.zeros(1, 3, 64, 48)).latent_dist.mean * pipe.vae.config.scaling_factor
    assert torch.equal(seen, grey.expand(2, -1, -1, -1))
    captured = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    pipe("x", width=48, height=64, num_inference_steps=1, guidance_scale=0, **from_text(pipe, 48, 64))
    hook.remove()
    assert torch.equal(captured[0][:, 4:5], mask[:1])
    assert (captured[0][:, 5:] - grey).abs().mean() < 3 * pipe.vae.config.scaling_factor  # which is drawn, not the mean


def test_the_refiner_is_told_a_score_in_place_of_a_second_size(thin_model):
    pipe = load_pipeline(locate(str(thin_model("sdxl_refiner").path)))
    states, _, pooled, _ = encode_prompt(pipe, "x")
    call = unet_call(pipe, torch.randn(1, 4, 8, 8), torch.tensor([1]), states, pooled)
    assert call["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 6]]
    assert pipe.unet(**call).sample.shape == (1, 4, 8, 8)
