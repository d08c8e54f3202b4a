"""Linear attention as a layer of its own: the strongest rival, and the global branch of ``Hyena2D``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import linear, naive
from .projections import apply


class FeatureMap(nn.Module):
    """Learned directions in each head, whose exponentials are linear attention's features.

    Softmax attention weighs by ``exp(q . k)``; the exponential of a few learned projections comes closer to it
    than elu + 1 (https://arxiv.org/abs/2402.04347 teaches such maps to mimic softmax attention). The directions
    start at the head's own channels and their negatives, then random rotations.

    Args:
        heads, width: heads and channels of each.
        multiple: features per channel.
    """

    def __init__(self, heads: int, width: int, multiple: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, multiple * width, width))
        self.bias = nn.Parameter(torch.zeros(heads, multiple * width, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start described above."""
        width = self.weight.shape[-1]
        # The temperature of softmax attention, so that a teacher's q and k mean the same here.
        identity = torch.eye(width, device=self.weight.device) * width**-0.25
        for number, block in enumerate(self.weight.split(width, dim=1)):
            if number < 2:
                block.copy_(identity if number == 0 else -identity)
            else:
                for head in block:
                    head.copy_(nn.init.orthogonal_(torch.empty_like(head, dtype=torch.float32)) * width**-0.25)

    def forward(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        """The logarithms of the features, (B, heads, features, L), from those heads' x (B, heads, width, L); at
        least float32, since they are going to be exponents."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return self.weight[heads].to(dtype) @ x.to(dtype) + self.bias[heads].to(dtype)


class FeatureMaps(nn.Module):
    """Linear attention with its feature map: ``elu`` (elu + 1, no parameters) or ``exp`` (:class:`FeatureMap`)."""

    def __init__(self, heads: int, width: int, feature_map: str, num_features: int) -> None:
        super().__init__()
        if feature_map not in linear.FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {linear.FEATURE_MAPS}, got {feature_map!r}")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        self.kind, self.width = feature_map, width
        self.multiple = num_features if feature_map == "exp" else 1  # features per channel
        if feature_map == "exp":
            self.query, self.key = FeatureMap(heads, width, num_features), FeatureMap(heads, width, num_features)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, heads: slice = slice(None), reference: bool = False) -> Tensor:
        """q, k, v of some heads, each (B, heads, width, L) -> the same shape. ``reference``: by the definition."""
        attention = naive.linear_attention if reference else linear.linear_attention
        if self.kind == "elu":
            return attention(q * self.width**-0.25, k * self.width**-0.25, v)
        return attention(self.query(q, heads), self.key(k, heads), v, "exp")


class LinearAttention(nn.Module):
    """Normalised linear attention in place of softmax attention, with its own projections.

    With ``feature_map="elu"`` this is the operator LinFusion trains (https://arxiv.org/abs/2409.02097), without
    its extra MLPs on q and k.

    Args:
        dim: channels D of input and output.
        inner_dim: width of the projections, ``dim`` unless given.
        attention_heads: heads.
        feature_map, num_features: see :class:`FeatureMaps`.
        in_bias: whether ``in_proj`` has a bias.

    Raises ValueError for hyper-parameters that do not fit together.
    """

    form, order = "full", 2

    def __init__(
        self,
        dim: int,
        *,
        inner_dim: int | None = None,
        attention_heads: int = 8,
        feature_map: str = "elu",
        num_features: int = 1,
        in_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = inner_dim or dim
        if inner % attention_heads:
            raise ValueError(f"{inner} channels cannot be split into {attention_heads} attention heads")
        self.dim, self.inner_dim, self.attention_heads = dim, inner, attention_heads
        self.in_proj = nn.Linear(dim, 3 * inner, bias=in_bias)
        self.out_proj = nn.Linear(inner, dim)
        self.features = FeatureMaps(attention_heads, inner // attention_heads, feature_map, num_features)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, h * w, D) -> (B, h * w, D); size: (h, w). Raises ValueError if they do not fit."""
        if x.shape[1] != size[0] * size[1]:
            raise ValueError(f"{x.shape[1]} tokens are not a {size[0]} x {size[1]} grid")
        parts = apply(self.in_proj, x).transpose(1, 2).chunk(3, dim=1)
        q, k, v = (t.unflatten(1, (self.attention_heads, -1)) for t in parts)
        return apply(self.out_proj, self.features(q, k, v).flatten(1, 2).transpose(1, 2))
