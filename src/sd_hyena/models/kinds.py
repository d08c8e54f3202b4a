"""What a weights file is, by the names of its tensors, and what to do with it where it is not what was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..families import UNET
from .ldm import TEXT, VAE

SUPPORTED = "Stable Diffusion 1.x, 2.x and SDXL, with their inpainting versions and SDXL's refiner"
_WHOLE = "give a whole checkpoint, or a diffusers folder, with -m"
_BASE = "give the model that it goes with by -m"
_TRANSFORMER = f"it has no UNet, and sd-hyena works on the UNets of {SUPPORTED}"


class Kind(NamedTuple):
    """``what`` completes "this is"; ``remedy`` is what to do with it in place of naming it as a model."""

    what: str
    remedy: str
    marks: re.Pattern[str]


def _kind(what: str, remedy: str, marks: str) -> Kind:
    return Kind(what, remedy, re.compile(marks))


# In this order: what comes first may also have names of what comes later.
HYENA = _kind(
    "a Hyena file",
    "give it with -y/--hyena, and the model that it was trained on with -m",
    r"layers\.(IN|OUT|M)\d\d|filter_fn\.implicit_filter\.0\.weight$",
)
# What goes with a model: where a few such tensors are left in a whole checkpoint, it is one all the same.
COMPANIONS = (
    _kind(
        "a LoRA",
        f"{_BASE}; in Python, pipe.load_lora_weights loads the LoRA",
        r"lora_(unet|te\d?|transformer|prior)_|.*[._](lora_(A|B|down|up|mid)|lora\.(down|up)|hada_w\d|lokr_w\d|oft_diag"
        r"|oft_blocks|lora_linear_layer|dora_scale)\b",
    ),
    _kind("an IP-Adapter", f"{_BASE}; in Python, pipe.load_ip_adapter loads it", r"(image_proj|ip_adapter)\."),
    _kind("AnimateDiff's motion modules", _BASE, r".*motion_modules\."),
    _kind(
        "a ControlNet",
        f"{_BASE}; in Python, a ControlNet pipeline takes both",
        r"(control_model|controlnet_cond_embedding|controlnet_down_blocks|lora_controlnet|input_hint_block)\b",
    ),
    _kind("a T2I-Adapter", _BASE, r"(adapter\.)?body\.\d+\.(resnets|block\d|in_conv)\b"),
    _kind(
        "an upscaler",
        "give a model that draws; an upscaler goes over its pictures",
        r"(params(_ema)?\.)?(conv_first\.|RRDB_trunk\.|model\.1\.sub\.|body\.\d+\.rdb\d|layers\.\d+\.residual_group\.)",
    ),
    _kind("a hypernetwork", _BASE, r"\d+\.(\d+\.)?linear\.\d"),
    _kind("a CLIP vision model", _BASE, r"(vision_model|visual)\."),
    _kind("a small VAE (TAESD)", _BASE, r"(taesd_)?(en|de)coder\.layers\.\d|\d+\.((weight|bias)$|conv\.\d)"),
)
QUANTISED = _kind(
    "a quantised checkpoint",
    "give one of float16",
    r".*\.(absmax|quant_map|quant_state|scale_weight|weight_scale|SCB|weight_format)\b",
)
# Whole models among them.
KINDS = (
    _kind("a FLUX model", _TRANSFORMER, r".*(double_blocks|single_blocks|single_transformer_blocks)\.\d"),
    _kind("a Stable Diffusion 3 model", _TRANSFORMER, r".*joint_blocks\.\d|transformer_blocks\.\d+\.norm1_context"),
    _kind("a PixArt model", _TRANSFORMER, r"(.*\.)?(adaln_single|t_block|y_embedder|caption_projection)\."),
    _kind(
        "a diffusion transformer",
        _TRANSFORMER,
        r".*(adaLN_modulation|scale_shift_table|cap_embedder|double_stream_blocks|txt_in\.|patchify_proj)|"
        r"(model\.diffusion_model\.)?(patch_embedding|transformer_blocks\.\d|blocks\.\d+\.(attn|cross_attn|self_attn))\b",
    ),
    _kind(
        "a Stable Cascade model",
        f"sd-hyena works on {SUPPORTED}",
        r".*(clip_txt_mapper|down_blocks\.\d\.\d\.channelwise)",
    ),
    _kind("a Stable Video Diffusion model", f"sd-hyena works on {SUPPORTED}", r".*\.(time_stack|time_mixer)\."),
    _kind(
        "a Kolors model", f"sd-hyena works on {SUPPORTED}", r"(model\.diffusion_model\.)?encoder_hid_proj\.|.*chatglm"
    ),
    _kind(
        "a DeepFloyd IF model",
        f"sd-hyena works on {SUPPORTED}",
        r"(model\.diffusion_model\.)?(encoder_proj|encoder_pooling)\.|.*attentions\.\d\.add_k_proj\.",
    ),
    QUANTISED,
    _kind(
        "a checkpoint with a noise schedule of its own (EDM)", f"sd-hyena works on {SUPPORTED}", r"edm_(mean|std|vpred)"
    ),
)
# What a file has nothing but.
ALONE = (
    _kind("a UNet alone", _WHOLE, r"((model\.)?(diffusion_model|model_ema)|(in|out)put_blocks|middle_block)\b"),
    _kind("a UNet alone", _WHOLE, r"(conv_in|down_blocks|mid_block|up_blocks|time_embedding)\."),
    _kind(
        "a VAE alone", _WHOLE, r"(first_stage_model|vae)\.|(en|de)coder\.(conv_in|down|up|mid|down_blocks|mid_block)\b"
    ),
    _kind(
        "a text encoder alone",
        _WHOLE,
        r"((cond_stage_model|conditioner|text_encoders?)\.)|(.*\.)?(text_model|resblocks|shared|token_embedding)\.|"
        r"(encoder\.block|embeddings\.(token|position)_embedding)\.",
    ),
    _kind(
        "a textual inversion embedding",
        f"{_BASE}; in Python, pipe.load_textual_inversion loads it",
        r"(emb_params|string_to_param|clip_[lg]|<[^>]+>)",
    ),
)


def kind_of(names: Iterable[str], metadata: dict[str, str] | None = None, whole: bool = True) -> Kind | None:
    """What a file with tensors of these names is, unless a checkpoint with all its parts (unless ``whole``: with a
    UNet); None if nobody knows."""
    names = list(names)
    if (metadata or {}).get("format") == "sd-hyena":
        return HYENA
    kinds = (HYENA, *(() if is_checkpoint(names) else COMPANIONS), *KINDS)
    for kind in kinds:
        if any(kind.marks.match(name) for name in names):
            return kind
    if is_checkpoint(names) or (not whole and any(name.startswith(UNET) for name in names)):
        return None
    return next((kind for kind in ALONE if any(kind.marks.match(name) for name in names)), None)


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a single file (names in LDM's numbering) has more than a UNet."""
    starts = [any(name.startswith(prefix) for name in names) for prefix in ((UNET,), VAE, TEXT)]
    return starts[0] and (starts[1] or starts[2])
