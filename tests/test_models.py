"""The configs that let single files of Stable Diffusion 1.x load without a network."""

import torch
from demo.ldm_export import unet_key, vae_key

from sd_hyena.models import CONFIGS, ModelSource, unet_skeleton
from sd_hyena.targets import find_targets


def test_sd1_configs_build_the_sd1_unet():
    unet = unet_skeleton(ModelSource("sd1", "folder", str(CONFIGS / "sd1")))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert len(find_targets(unet)) == 16
    keys = {unet_key(k, 2, [False, True, True, True]) for k in unet.state_dict()}
    assert len(keys) == len(unet.state_dict()) == 686
    assert "output_blocks.5.2.conv.weight" in keys
    assert "input_blocks.3.0.op.weight" in keys


def test_sd1_vae_and_text_encoder_have_sd1s_sizes():
    import json

    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(json.loads((CONFIGS / "sd1/vae/config.json").read_text()))
        text = CLIPTextModel(CLIPTextConfig(**json.loads((CONFIGS / "sd1/text_encoder/config.json").read_text())))
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in text.parameters()) == 123_060_480
    assert "decoder.up.0.block.2.conv2.weight" in {vae_key(k, 4) for k in vae.state_dict()}
