"""Writes a diffusers Stable Diffusion 1.x pipeline as one file with LDM keys, as checkpoints in the wild have."""

from __future__ import annotations

import re

from safetensors.torch import save_file

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_key(key, layers, up_has_attention):
    """One UNet key in LDM's numbering."""
    for ours, theirs in _UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return _inside(theirs + key[len(ours) :])
    side, block, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
    block, index = int(block), int(index)
    if side == "down":
        base = 1 + block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{base + layers}.0.op.{rest.removeprefix('conv.')}"
        return _inside(f"input_blocks.{base + index}.{0 if kind == 'resnets' else 1}.{rest}")
    base = block * (layers + 1)
    if kind == "upsamplers":
        return f"output_blocks.{base + layers}.{2 if up_has_attention[block] else 1}.{rest}"
    return _inside(f"output_blocks.{base + index}.{0 if kind == 'resnets' else 1}.{rest}")


def _inside(key):
    if ".transformer_blocks." in key:
        return key
    for ours, theirs in _RESNET:
        key = re.sub(rf"\.{ours}\.", f".{theirs}.", key)
    return key


def vae_key(key, blocks):
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def export(pipe, path):
    """Writes UNet, VAE and text encoder of ``pipe`` to ``path``."""
    unet, tensors = pipe.unet, {}
    with_attention = [hasattr(block, "attentions") for block in unet.up_blocks]
    for key, value in unet.state_dict().items():
        tensors["model.diffusion_model." + unet_key(key, unet.config.layers_per_block, with_attention)] = value
    blocks = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        tensors["first_stage_model." + vae_key(key, blocks)] = value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
