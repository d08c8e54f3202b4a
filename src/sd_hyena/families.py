"""Families of Stable Diffusion UNets: a new one is an entry of ``FAMILIES`` and its configs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .long_prompts import warn_of_cut

if TYPE_CHECKING:
    from torch import Tensor

DEMO = "demo"
DEMO_DIR = Path(__file__).parent / "demo" / "teacher"
CONFIGS = Path(__file__).parent / "configs"
# The first cross-attention of Stable Diffusion 1 and 2, in a single file: it shows how wide the text states are.
_CROSS_ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@dataclass(frozen=True)
class Family:
    """A single file belongs to it by the width of its text states, or by tensor names that start with ``prefix``."""

    configs: Path  # of its components, as in a diffusers folder
    text_width: int
    pooled_width: int = 0  # of the pooled text its UNet takes too, with the picture's size; 0: it takes neither
    tokenizer: Path | None = None  # None: ``configs`` has the UNet's alone, and the hub has the others
    prefix: str | None = None
    pipeline: str = "StableDiffusionPipeline"  # class in diffusers

    def config(self, component: str) -> dict[str, Any]:
        """What ``component``'s config.json says."""
        return json.loads((self.configs / component / "config.json").read_text())


FAMILIES = {
    DEMO: Family(DEMO_DIR, 64, tokenizer=DEMO_DIR / "tokenizer"),
    "sd15": Family(CONFIGS / "sd1", 768, tokenizer=DEMO_DIR / "tokenizer"),
    "sd21": Family(CONFIGS / "sd21", 1024),
    "sdxl": Family(CONFIGS / "sdxl", 2048, 1280, prefix="conditioner.", pipeline="StableDiffusionXLPipeline"),
}
ARCHITECTURES = tuple(name for name in FAMILIES if name != DEMO)  # what --random_weights takes


def recognise(shapes: Mapping[str, Sequence[int]]) -> Family | None:
    """The family of a single file with tensors of these names and shapes; None if it is of none of them."""
    width = shapes[_CROSS_ATTENTION][1] if _CROSS_ATTENTION in shapes else None
    for family in FAMILIES.values():
        if width == family.text_width or (family.prefix and any(name.startswith(family.prefix) for name in shapes)):
            return family
    return None


def encode_prompt(pipe: Any, prompt: str) -> tuple[Tensor, ...]:
    """States with the prompt and with none, as the pipeline guides with; SDXL: then both pooled ones. On the CPU.

    All prompts have equally many tokens: what is beyond them is cut, and said."""
    warn_of_cut(pipe, prompt)
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return tuple(text.cpu() for text in pipe.encode_prompt(prompt, device=pipe.unet.device, **options))


def unet_call(pipe: Any, sample: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor | None = None) -> dict:
    """Keyword arguments of a UNet call; with pooled text (SDXL), also the picture's size as it would be drawn."""
    device, dtype = pipe.unet.device, pipe.unet.dtype
    call: dict[str, Any] = {"sample": sample.to(device, dtype), "timestep": timestep.to(device)}
    call["encoder_hidden_states"] = states.to(device, dtype)
    if pooled is not None:
        h, w = (side * pipe.vae_scale_factor for side in sample.shape[-2:])
        pooled = pooled.to(device, dtype)
        ids = pooled.new_tensor([[h, w, 0, 0, h, w]] * len(pooled))
        call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return call
