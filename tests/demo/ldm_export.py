"""Writes pipelines as one file with LDM keys, as checkpoints in the wild have: a given one, or one of any family with
random weights, of full size or thin."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sd_hyena.families import FAMILIES, MASK_CHANNELS, UNET

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_OPEN_CLIP = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
    for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
        key = key.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{theirs}")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def open_clip(state, layers):
    """Text encoder of transformers -> OpenCLIP's names; ``layers`` at least, the last ones over again."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    last = max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))
    tensors = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "text_projection": state.get("text_projection.weight", torch.eye(len(state["final_layer_norm.bias"]))).T,
        "logit_scale": torch.tensor(4.6),
    }
    tensors |= {f"ln_final.{kind}": state[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    for layer in range(max(layers, last + 1)):
        ours, theirs = f"encoder.layers.{min(layer, last)}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            for old, new in _OPEN_CLIP:
                value = state[f"{ours}{old}.{kind}"]
                tensors[f"{theirs}{new}.{kind}"] = value if layer <= last else value.clone()
    return tensors


def ldm_tensors(states, family, unet_config, vae_config):
    """The tensors of a single file, from the components' state dicts by name."""
    tensors = {}
    with_attention = [kind.startswith("CrossAttn") for kind in unet_config["up_block_types"]]
    for key, value in states["unet"].items():
        tensors[UNET + unet_key(key, unet_config["layers_per_block"], with_attention)] = value
    for key, value in states["vae"].items():
        attention = ".attentions." in key and value.ndim == 2
        new = vae_key(key, len(vae_config["block_out_channels"]))
        tensors["first_stage_model." + new] = value[:, :, None, None] if attention else value
    for component, prefix in family.text_encoders.items():
        if prefix.endswith(".model."):
            second = prefix.startswith("cond_stage_model")  # Stable Diffusion 2 leaves the last of its layers out
            named = open_clip(states[component], 24 if second else 0)
        else:
            named = {"text_model." + k.removeprefix("text_model."): v for k, v in states[component].items()}
        tensors |= {prefix + key: value for key, value in named.items()}
    return {key: value.contiguous() for key, value in tensors.items()}


def export(pipe, path, family=FAMILIES["demo"]):
    """Writes UNet, VAE and text encoders of ``pipe`` to ``path``."""
    states = {name: getattr(pipe, name).state_dict() for name in ("unet", "vae", *family.text_encoders)}
    save_file(ldm_tensors(states, family, pipe.unet.config, pipe.vae.config), path)


def thin(name, folder):
    """A family like the named one with few channels, and all its layers and names; its configs go to ``folder``."""
    family = FAMILIES[name]
    configs = Path(folder) / name
    width = family.text_width // 64
    for component in ("unet", "vae", "scheduler", *family.text_encoders, *_tokenizers(family)):
        config = family.config(component)
        if component == "unet":
            channels = config["block_out_channels"]
            config["block_out_channels"] = [c // 40 if c % 40 == 0 else c // 48 for c in channels]
            config |= {"cross_attention_dim": width, "norm_num_groups": 4}
            heads = config["attention_head_dim"]
            config["attention_head_dim"] = 2 if isinstance(heads, int) else [2] * len(heads)
            if family.pooled_width:
                config["addition_time_embed_dim"] = 8
                sizes = (config["projection_class_embeddings_input_dim"] - family.pooled_width) // 256
                config["projection_class_embeddings_input_dim"] = family.pooled_width // 64 + 8 * sizes
            if family.inpaints:
                config["in_channels"] -= MASK_CHANNELS
        elif component == "vae":
            config |= {"block_out_channels": [8] * 4, "norm_num_groups": 4}
        elif component in family.text_encoders:
            small = config["hidden_size"] // 64
            config |= {"hidden_size": small, "intermediate_size": small, "num_attention_heads": 2}
            config["projection_dim"] = small
        path = configs / component
        path.mkdir(parents=True)
        kind = component.partition("_")[0]
        file = f"{kind}_config.json" if kind in ("scheduler", "tokenizer") else "config.json"
        (path / file).write_text(json.dumps(config))
    (configs / "model_index.json").write_text(json.dumps(family.index()))
    return replace(family, configs=configs, shared=None, text_width=width, pooled_width=family.pooled_width // 64)


def _tokenizers(family):
    return [name for name, kind in family.index().items() if name.startswith("tokenizer") and kind[0]]


def random_states(family, dtype=torch.float16):
    """State dicts of a family's components with random weights that keep activations at their size."""
    import diffusers
    import transformers

    states = {}
    for component in ("unet", "vae", *family.text_encoders):
        kind, config = family.index()[component][1], family.config(component)
        with torch.device("meta"):
            if component in family.text_encoders:
                model_class = getattr(transformers, kind)
                model = model_class(model_class.config_class(**config))
            else:
                model = getattr(diffusers, kind).from_config(config)
        states[component] = {}
        for key, value in model.state_dict().items():
            noise = torch.randn(value.shape)
            if value.dim() > 1:
                noise *= value[0].numel() ** -0.5 if "embedding" not in key else 0.1
            else:
                noise = noise * 0.02 + (key.endswith("weight") and "norm" in key)
            states[component][key] = noise.to(dtype)
    return states


def write(family, path, dtype=torch.float16, change=lambda tensors: tensors, metadata=None):
    """Writes a single file of ``family`` (an entry of FAMILIES, or one made by :func:`thin`) with random weights.

    ``change`` may alter the tensors before they are saved; a path that ends in .ckpt is saved by torch, nested.
    Returns the state dicts of the components.
    """
    states = random_states(family, dtype)
    tensors = change(ldm_tensors(states, family, family.config("unet"), family.config("vae")))
    if Path(path).suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    else:
        save_file(tensors, path, metadata)
    return states
