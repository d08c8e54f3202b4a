"""Harmless changes to the teacher: what its own pictures move by when nothing was replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

BACKEND, HALF = "another attention backend", "bfloat16"


@contextlib.contextmanager
def another_backend(unet: nn.Module) -> Iterator[None]:
    """Within the block, attention is computed as written, one head at a time, and not by PyTorch's fused kernel.

    Only layers with diffusers' own plain processors are changed; all get back the very processors they had.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

    before = dict(unet.attn_processors)
    plain = (AttnProcessor, AttnProcessor2_0)
    try:
        unet.set_attn_processor({name: SlicedAttnProcessor(1) if type(p) in plain else p for name, p in before.items()})
        yield
    finally:
        unet.set_attn_processor(dict(before))  # it empties what it is given


@contextlib.contextmanager
def half_precision(unet: nn.Module) -> Iterator[None]:
    """Within the block, the UNet computes in bfloat16 where autocast holds it safe; its output keeps its type."""
    before = unet.__dict__.get("forward")
    forward = unet.forward

    def in_half(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(sample.device.type, torch.bfloat16):
            result = forward(sample, *args, **kwargs)
        if isinstance(result, tuple):
            return (result[0].to(sample.dtype), *result[1:])
        result.sample = result.sample.to(sample.dtype)
        return result

    unet.forward = in_half
    try:
        yield
    finally:
        if before is None:
            del unet.forward
        else:
            unet.forward = before


def yardsticks(unet: nn.Module) -> dict[str, contextlib.AbstractContextManager[None]]:
    """The changes that apply to this UNet, by name. One in bfloat16 already cannot be compared to itself."""
    changes: dict[str, contextlib.AbstractContextManager[None]] = {BACKEND: another_backend(unet)}
    if unet.dtype != torch.bfloat16:
        changes[HALF] = half_precision(unet)
    return changes
