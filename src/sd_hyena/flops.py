"""What self-attention costs: floating point operations of one UNet call, layer by layer. Needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import UsageError
from .targets import find_targets
from .texts import reason

TEXT_TOKENS = 77
COUNTED = (
    f"one UNet call for one picture and {TEXT_TOKENS} text tokens (guidance takes two a step); matrix products and "
    "convolutions, two operations a multiplication and addition; attn1 with its projections, quadratic without"
)


@dataclass(frozen=True)
class Cost:
    """Of one self-attention layer: all of ``attn1``, and the part that grows with the square of the tokens."""

    attention: int
    quadratic: int


def step_flops(unet: Any, latent: tuple[int, int]) -> tuple[int, dict[str, Cost]]:
    """(of one call for one (h, w) latent image, of each target in it). ``unet`` is on the meta device.

    Raises UsageError for a UNet that takes more than a picture, a time step, text, a class and sizes.
    """
    try:
        call = _call(unet, latent)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(**call)
    except Exception as error:  # a UNet that lacks something says so in many ways
        raise UsageError(f"the operations of this UNet cannot be counted: {reason(error)}") from error
    counts, costs = counter.get_flop_counts(), {}
    linear = {torch.ops.aten.mm, torch.ops.aten.addmm}
    for name, target in find_targets(unet).items():
        by_kind = counts[f"{type(unet).__name__}.{target.path}"]
        whole = sum(by_kind.values())
        costs[name] = Cost(whole, whole - sum(n for kind, n in by_kind.items() if kind in linear))
    return counter.get_total_flops(), costs


def _call(unet: nn.Module, latent: tuple[int, int]) -> dict[str, Any]:
    config: Any = unet.config
    for name in ("addition_embed_type", "encoder_hid_dim_type"):
        if "image" in str(config.get(name)):
            raise ValueError(f"it is told pictures ({name} {config[name]})")
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    with torch.device("meta"):
        call: dict[str, Any] = {
            "sample": torch.empty(1, config.in_channels, *latent),
            "timestep": torch.empty(()),
            "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, width),
        }
        if config.addition_embed_type == "text_time":  # SDXL: pooled text and the picture's size, told together
            ids = torch.empty(1, 6)
            pooled = config.projection_class_embeddings_input_dim - ids.shape[1] * config.addition_time_embed_dim
            call["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": ids}
        if (label := _class_label(config)) is not None:
            call["class_labels"] = label
    return call


def _class_label(config: Any) -> torch.Tensor | None:
    """What a UNet that is told a class takes for one picture: a number, or the numbers that stand for it."""
    widths = {
        "identity": config.time_embedding_dim or 4 * config.block_out_channels[0],
        "projection": config.projection_class_embeddings_input_dim,
        "simple_projection": config.projection_class_embeddings_input_dim,
    }
    if config.class_embed_type in widths:
        return torch.empty(1, widths[config.class_embed_type])
    if config.class_embed_type == "timestep":
        return torch.empty(1)
    return None if config.num_class_embeds is None else torch.empty(1, dtype=torch.long)
