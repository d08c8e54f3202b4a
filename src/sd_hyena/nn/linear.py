"""Linear attention, https://arxiv.org/abs/2006.16236: the strongest rival, and the global part of other operators."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OperatorConfig
from ..ops import naive
from ..ops.mix import Call, mix
from .operator import InProjection, Linear, Operator, Projection, Size, copy_projections
from .teacher import projections_of

Parts = tuple[Tensor, Tensor, Tensor]  # q, k and v, (B, L, H, d) each
# What q and k, in softmax attention's temperature, are shifted by at the start: a squared or cubed ReLU is
# closest to an exponential half a unit right of its zero.
OFFSETS = {"cubed_relu": 0.5, "squared_relu": 0.5, "exp": 0.0, "elu": 0.0}


class HeadwiseLinear(nn.Module):
    """A linear map in each head. x: (B, L, H d) -> the same shape."""

    def __init__(self, heads: int, width: int, scale: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.eye(width).expand(heads, width, width).clone())
        self.bias = nn.Parameter(torch.full((heads, 1, width), offset))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (len(self.weight), -1)).transpose(1, 2)
        return (heads @ self.weight.to(x.dtype) + self.bias.to(x.dtype)).transpose(1, 2).flatten(2)


class LinearAttention(Operator):
    """Normalised linear attention, one feature for each channel of q and k.

    Features are positive functions of what ``in_proj`` makes of x: their directions are its own rows, so that
    they cost nothing beyond the projection. With ``feature_map`` elu this is the operator LinFusion trains
    (https://arxiv.org/abs/2409.02097), without its extra MLPs on q and k. In ``core`` form q and k are the teacher's,
    and each head has a linear map between them and their features.

    Raises ValueError if the channels cannot be split into the heads.
    """

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__(config)
        self.heads, self.width = config.attention_heads, config.inner // config.attention_heads
        if config.inner % self.heads:
            raise ValueError(f"{config.inner} channels cannot be split into {self.heads} attention heads")
        self.offset = OFFSETS[config.feature_map]
        self.query: HeadwiseLinear | None = None
        self.key: HeadwiseLinear | None = None
        if self.core:
            scale = self.width**-0.25
            self.query, self.key = (HeadwiseLinear(self.heads, self.width, scale, self.offset) for _ in range(2))
        else:
            self.in_proj = InProjection(config.dim, 3 * config.inner)
            self.out_proj = Linear(config.inner, config.dim)

    def run(self, x: Tensor, size: Size, projections: Iterable[Projection] | None) -> Tensor:
        parts, out = self.project(x, projections)
        y = mix(self.call(parts, size))
        del parts  # or they would still be there beside the output
        return out(y)

    def project(self, x: Tensor, projections: Iterable[Projection] | None) -> tuple[Parts, Projection]:
        """What features of q and k are made of, and v; and the output projection."""
        if projections is None:
            out: Projection = self.out_proj
            q, k, v = self.in_proj(x)
        else:
            to_q, to_k, to_v, out = projections
            q, k, v = to_q(x), to_k(x), to_v(x)
        if self.query is not None and self.key is not None:
            q, k = self.query(q), self.key(k)
        return self.split((q, k, v)), out

    def unfold(self) -> None:
        """In ``full`` form each head gets a linear map between projection and features, as ``core`` has for good: with
        two factors to learn, features are found in fewer steps."""
        if self.query is None:
            self.query, self.key = (HeadwiseLinear(self.heads, self.width, 1.0, 0.0) for _ in range(2))

    @torch.no_grad()
    def folded(self) -> Operator:
        if self.core or self.query is None:
            return self
        twin = copy.deepcopy(self)
        for part, layer in enumerate((twin.query, twin.key)):
            assert layer is not None
            rows = slice(part * self.inner_dim, (part + 1) * self.inner_dim)
            weight, bias = (t[rows].unflatten(0, (self.heads, -1)) for t in (twin.in_proj.weight, twin.in_proj.bias))
            twin.in_proj.weight[rows] = (layer.weight.transpose(1, 2) @ weight).flatten(0, 1)
            twin.in_proj.bias[rows] = (bias[:, None] @ layer.weight + layer.bias).flatten()
        twin.query = twin.key = None
        return twin

    def split(self, parts: Sequence[Tensor]) -> Parts:
        """q, k and v by heads."""
        q, k, v = (t.unflatten(-1, (self.heads, self.width)) for t in parts)
        return q, k, v

    def call(self, parts: Parts, size: Size) -> Call:
        """What is to be computed between the projections."""
        return Call(*parts, size, self.config.feature_map)

    def reference(self, x: Tensor, size: Size, tokens: Tensor, projections: Iterable[Projection] | None) -> Tensor:
        parts, out = self.project(x, projections)
        return out(self.define(parts, size, tokens))

    def define(self, parts: Parts, size: Size, tokens: Tensor) -> Tensor:
        """The definition between the projections: (B, S, H d)."""
        q, k, v = (t.transpose(1, 2) for t in parts)
        return naive.linear_attention(q, k, v, self.config.feature_map, tokens, self.block_weights(size, tokens))

    def block_weights(self, size: Size, tokens: Tensor) -> Tensor | None:
        """How much each head weighs each cell from each token, (H, S, L), by their blocks."""
        return None

    @torch.no_grad()
    def start_from(self, attention: nn.Module, records: Sequence[tuple[Tensor, Size]]) -> None:
        if not self.core:  # with softmax attention's temperature, half for q and k each
            copy_projections(self, attention, self.width**-0.25, self.offset)

    def teacher_projections(self, attention: nn.Module) -> Any:
        """What :meth:`project` is to be given while it starts from a teacher."""
        return projections_of(attention) if self.core else None

    def flops(self, size: Size) -> int:
        return 2 * 2 * size[0] * size[1] * self.inner_dim * (self.width + 1)
