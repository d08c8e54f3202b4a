"""Names in single files: what they are called in LDM's numbering, whatever a trainer or a tool made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..families import UNET

VAE = ("first_stage_model.", "vae.")
TEXT = ("cond_stage_model.", "conditioner.embedders.")
_EMA = "model_ema."
_OLD_CLIP = re.compile(r"cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")
_SGM_OPEN_CLIP = "conditioner.embedders.0.model."
# The words that names of UNets are made of; those of averaged weights are run together.
_WORD = re.compile(
    r"((?:in|out)put_blocks)(\d+)(\d)|(label_emb)(\d)(\d)|(\d+|middle_block|time_embed|in_layers|emb_layers|out_layers|"
    r"skip_connection|transformer_blocks|attn[12]|norm[123]|norm|proj_in|proj_out|proj|to_out|to_[qkv]|ff|net|conv|op|"
    r"out|weight|bias)"
)


def ldm_names(names: Iterable[str]) -> dict[str, str]:
    """Name in LDM's numbering -> name in the file. What all names begin with is left out; averaged weights (EMA)
    stand in where there are no others; text encoders that are saved in an older or a newer way have their usual
    names."""
    names = list(names)
    prefix = common_prefix(names)
    found = {name.removeprefix(prefix): name for name in names}
    names = list(found)
    if not any(name.startswith(UNET) for name in names):
        found |= {separate(name): found[name] for name in names if name.startswith(f"{_EMA}diffusion_model")}
    usual = {n: _OLD_CLIP.sub("cond_stage_model.transformer.text_model.", n) for n in names if _OLD_CLIP.match(n)}
    if f"{UNET}input_blocks.1.1.norm.weight" in found:  # Stable Diffusion 2 has attention there, SDXL's refiner none
        usual |= {
            n: n.replace(_SGM_OPEN_CLIP, "cond_stage_model.model.") for n in names if n.startswith(_SGM_OPEN_CLIP)
        }
    return found | {new: found[old] for old, new in usual.items()}


def common_prefix(names: Iterable[str]) -> str:
    """What comes before the UNet's usual prefix where no name begins with that: a trainer's wrapper, or the key that
    the weights are under in a pickle. Averaged weights come last."""
    prefixes = {name.partition(UNET)[0] for name in names if f".{UNET}" in f".{name}"}
    return min(prefixes, key=lambda prefix: ("ema" in prefix, len(prefix)), default="")


def separate(name: str) -> str:
    """``model_ema.diffusion_modelinput_blocks10norm...`` with its dots, under the UNet's usual prefix; as it is if
    it holds a word that no UNet has."""
    rest = name.removeprefix(f"{_EMA}diffusion_model")
    if rest.startswith("."):
        return f"{UNET}{rest[1:]}"
    matches = list(_WORD.finditer(rest))
    if "".join(match[0] for match in matches) != rest:
        return name
    return UNET + ".".join(part for match in matches for part in match.groups() if part is not None)
