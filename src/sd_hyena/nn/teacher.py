"""The attention that is replaced, seen from outside: its projections, and whether there is nothing else in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class Projections:
    """(to_q, to_k, to_v, to_out), each callable on (B, L, D).

    Not a tuple: hosts that move what a module is called with would move these modules too.
    """

    def __init__(self, to_q: Any, to_k: Any, to_v: Any, to_out: Any) -> None:
        self.layers = to_q, to_k, to_v, to_out

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def double(self) -> Projections:
        """The same as float64 functions, copies."""
        return Projections(*(copy.deepcopy(f).double() if isinstance(f, nn.Module) else f for f in self.layers))


def projections_of(attention: nn.Module) -> Projections:
    """What an attention module projects with."""
    to_out: Any = attention.to_out
    if isinstance(to_out, nn.ModuleList | nn.Sequential):
        active = [f for f in to_out if not (isinstance(f, nn.Dropout) and (f.p == 0 or not f.training))]
        # What there is to call in evaluation is the linear layer itself.
        to_out = active[0] if len(active) == 1 else nn.Sequential(*active)
    return Projections(attention.to_q, attention.to_k, attention.to_v, to_out)


def is_plain_self_attention(attention: nn.Module) -> bool:
    """True if nothing beyond q, k, v and out happens inside, so that an operator can stand in."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return (
        all(getattr(attention, name, None) is not None for name in PROJECTIONS)
        and all(getattr(attention, name, None) is None for name in extras)
        and not getattr(attention, "residual_connection", False)
        and not getattr(attention, "is_cross_attention", False)
        and getattr(attention, "rescale_output_factor", 1.0) == 1.0
        and getattr(attention, "inner_kv_dim", None) in (None, getattr(attention, "inner_dim", None))
    )
