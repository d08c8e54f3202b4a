"""The latent grid's true (h, w), handed from a ``Transformer2DModel`` to the self-attention in it.

It travels as an empty attention mask of that shape. The grid belongs to the call, not to the layer: as an argument it
is right for two threads, two sizes, compiled blocks and gradient checkpoints, and diffusers hands a mask to
self-attention alone.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn


def grid_mask(hidden_states: Tensor) -> Tensor:
    """An empty attention mask whose shape says what grid (..., h, w) the tokens come from."""
    return hidden_states.new_empty(0, *hidden_states.shape[-2:])


def is_grid_mask(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this is a :func:`grid_mask`."""
    return mask is not None and mask.dim() == 3 and mask.shape[0] == 0


def send(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of a ``Transformer2DModel``: gives all its self-attention the grid, unless there is a mask."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if len(args) <= 6 and kwargs.get("attention_mask") is None:
        kwargs = kwargs | {"attention_mask": grid_mask(hidden_states)}
    return args, kwargs


def drop(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of plain self-attention, which has no use for a grid."""
    if is_grid_mask(kwargs.get("attention_mask")):
        kwargs = kwargs | {"attention_mask": None}
    return args, kwargs
