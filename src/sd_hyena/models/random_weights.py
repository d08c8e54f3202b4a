"""Pipelines that were never trained: their time and memory are those of trained ones."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..families import FAMILIES
from .quiet import quiet_libraries

if TYPE_CHECKING:
    import torch


def random_pipeline(architecture: str, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, dict]:
    """An untrained pipeline of one of ``ARCHITECTURES``, built from its configuration alone.

    It has no text encoder: returns the pipeline and the random text states to call it with, for one prompt.
    """
    import diffusers
    import torch

    quiet_libraries()
    family = FAMILIES[architecture]
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(family.config("unet"))
        vae = diffusers.AutoencoderKL.from_config(family.config("vae"))
    for model in (unet, vae):
        model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # keeps activations at their size; norms start as the identity
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    kind = getattr(diffusers, family.pipeline)
    parts = {name: None for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty}
    parts |= {"unet": unet, "vae": vae, "scheduler": diffusers.EulerDiscreteScheduler()}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    text = {name: torch.randn(1, 77, family.text_width, **like) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if family.pooled_width:
        pooled = torch.randn(1, family.pooled_width, **like)
        text |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    return pipe, text
