"""The table of families: each one's configs, and how its single files are recognised."""

import diffusers
import pytest
import torch
from demo.ldm_export import unet_key, vae_key
from safetensors.torch import save_file

from sd_hyena.errors import SdHyenaError
from sd_hyena.families import FAMILIES, recognise
from sd_hyena.models import load_pipeline, locate, unet_skeleton
from sd_hyena.targets import find_targets

PUBLISHED = {"sd15": (16, 859_520_964), "sd21": (16, 865_910_724), "sdxl": (70, 2_567_463_684)}
TEXT_ENCODERS = {
    "demo": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "sd15": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "sd21": "cond_stage_model.model.ln_final.weight",
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
}


def skeleton(name):
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(FAMILIES[name].config("unet"))


def single_file(name):
    """A file's tensors, on no device: those that tell families apart, and the cross-attention that does not."""
    unet = skeleton(name)
    up = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    keys = {k: v for k, v in unet.state_dict().items() if ".attn2.to_k." in k}
    tensors = {f"model.diffusion_model.{unet_key(k, unet.config.layers_per_block, up)}": v for k, v in keys.items()}
    return tensors | {TEXT_ENCODERS[name]: torch.empty(4, device="meta")}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configs_build_the_unet_that_the_entry_describes(name):
    unet, family = skeleton(name), FAMILIES[name]
    config = unet.config
    assert config.cross_attention_dim == family.text_width
    times = 6 * (config.addition_time_embed_dim or 0)
    assert (config.projection_class_embeddings_input_dim or 0) - times == family.pooled_width
    if name in PUBLISHED:
        assert (len(find_targets(unet)), sum(p.numel() for p in unet.parameters())) == PUBLISHED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_single_files_are_recognised_by_their_tensors(name):
    assert recognise({key: tensor.shape for key, tensor in single_file(name).items()}) is FAMILIES[name]


def test_other_files_are_of_no_family():
    tensors = single_file("sd15")
    assert recognise({key: (tensor.shape[0], 999) for key, tensor in tensors.items()}) is None
    assert recognise({}) is None


@pytest.mark.parametrize(
    ("name", "pipeline", "offline"),
    [
        ("demo", "StableDiffusionPipeline", True),
        ("sd15", "StableDiffusionPipeline", True),
        ("sd21", "StableDiffusionPipeline", False),
        ("sdxl", "StableDiffusionXLPipeline", False),
        ("", "StableDiffusionPipeline", False),
    ],
)
def test_a_single_file_goes_to_its_familys_pipeline(name, pipeline, offline, tmp_path, monkeypatch):
    def caught(kind):
        def load(path, **options):
            raise SdHyenaError(f"{kind} {options.get('config')} {'tokenizer' in options}")

        return load

    for kind in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        monkeypatch.setattr(getattr(diffusers, kind), "from_single_file", caught(kind))
    path = tmp_path / "model.safetensors"
    tensors = single_file(name) if name else {"other": torch.empty(1)}
    save_file({key: torch.empty(1, *tensor.shape[1:]) for key, tensor in tensors.items()}, path)
    configs = FAMILIES[name].configs if offline else None
    with pytest.raises(SdHyenaError, match=f"^{pipeline} {configs} {offline}$"):
        load_pipeline(locate(str(path)))
    unet = unet_skeleton(locate(str(path)))
    assert (unet is not None) == offline
    assert unet is None or unet.config.cross_attention_dim == FAMILIES[name].text_width


def test_sd1_files_have_a_name_for_every_tensor_of_the_unet():
    state = skeleton("sd15").state_dict()
    keys = {unet_key(k, 2, [False, True, True, True]) for k in state}
    assert len(keys) == len(state) == 686
    assert "output_blocks.5.2.conv.weight" in keys
    assert "input_blocks.3.0.op.weight" in keys


def test_sd1_vae_and_text_encoder_have_sd1s_sizes():
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(FAMILIES["sd15"].config("vae"))
        text = CLIPTextModel(CLIPTextConfig(**FAMILIES["sd15"].config("text_encoder")))
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in text.parameters()) == 123_060_480
    assert "decoder.up.0.block.2.conv2.weight" in {vae_key(k, 4) for k in vae.state_dict()}
