"""The kinds of layer that are compared: attention in its implementations, its rivals, and Hyena.

Each is a whole layer, projections included, called as ``layer(x, size)`` with x (B, h * w, D), and says
what it should return at a few tokens (``expected``), by :mod:`.references`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import OPERATORS, OperatorConfig
from ..nn import build
from ..nn.operator import Linear
from ..nn.teacher import Projections as Given
from ..texts import reason
from . import references
from .settings import RIVALS


@dataclass(frozen=True)
class Shape:
    """One layer's input: ``height`` and ``width`` in latent cells at the layer; ``extent``: (h, w) cells of
    the grid that operators are made for."""

    dim: int
    heads: int
    height: int
    width: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    extent: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def squares(self, share: float = 1.0) -> int:
        """Bytes of that share of an L x L matrix for each image."""
        return int(share * self.batch * self.tokens**2 * torch.empty((), dtype=self.dtype).element_size())


class Attention(nn.Module):
    """Self-attention as in a UNet's ``attn1``: bias-free q, k, v projections, output projection with bias."""

    def __init__(self, shape: Shape, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = shape.heads, attend
        # As operators project, so that what is compared is what lies between the projections.
        self.to_q, self.to_k, self.to_v = (Linear(shape.dim, shape.dim, bias=False) for _ in range(3))
        self.to_out = Linear(shape.dim, shape.dim)
        _make_outputs_tell(self.to_out)
        for layer in (self.to_q, self.to_k):  # attention with peaks, as a trained model's has
            nn.init.normal_(layer.weight, std=1.5 * shape.dim**-0.5)

    @property
    def projections(self) -> list[nn.Linear]:
        return [self.to_q, self.to_k, self.to_v, self.to_out]

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.projections[:3])
        return self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def expected(self, x: Tensor, size: tuple[int, int], tokens: Tensor) -> Tensor:
        return references.attention(x, self.projections, self.heads, tokens)


def _make_outputs_tell(layer: nn.Module) -> None:
    """A bias would hide errors in what it is added to."""
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def make_parts_tell(operator: nn.Module) -> None:
    """Parts that start at nothing are checked only where they say something."""
    for parameter in operator.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


class Projections(Attention):
    """The four projections and nothing between them: what no replacement of attention can save."""

    def expected(self, x: Tensor, size: tuple[int, int], tokens: Tensor) -> Tensor:
        _, _, to_v, to_out = Given(*self.projections).double()
        return to_out(to_v(x[:, tokens]))


class LinearAttention(Attention):
    """Normalised linear attention, elu + 1: LinFusion's (https://arxiv.org/abs/2409.02097) without its extra MLPs."""

    def expected(self, x: Tensor, size: tuple[int, int], tokens: Tensor) -> Tensor:
        return references.linear_attention(x, self.projections, self.heads, tokens)


class TiledAttention(Attention):
    """Attention within square tiles, as HyperTile cuts them: about ``tile`` cells a side."""

    tile = 32

    def _index(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """(tiles, tokens of a tile)"""
        (h, w), grid = size, torch.arange(size[0] * size[1], device=device).view(size)
        rows, columns = (max(d for d in range(1, max(1, n // self.tile) + 1) if n % d == 0) for n in (h, w))
        return grid.view(rows, h // rows, columns, w // columns).transpose(1, 2).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        index = self._index(size, x.device)
        tiles = x[:, index].flatten(0, 1)
        y = super().forward(tiles, size).unflatten(0, (len(x), -1))
        return torch.empty_like(x).index_copy_(1, index.flatten(), y.flatten(1, 2))

    def expected(self, x: Tensor, size: tuple[int, int], tokens: Tensor) -> Tensor:
        index = self._index(size, x.device)
        own = [(index == token).any(1).nonzero().item() for token in tokens.tolist()]
        each = [
            references.attention(x, self.projections, self.heads, token[None], index[tile].expand(len(x), -1))
            for token, tile in zip(tokens, own, strict=True)
        ]
        return torch.cat(each, 1)


class MergedAttention(Attention):
    """Attention after half of the tokens are merged into their likes, by tomesd (https://arxiv.org/abs/2303.17604)."""

    def _merging(
        self, x: Tensor, size: tuple[int, int]
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        from tomesd.merge import bipartite_soft_matching_random2d

        generator = torch.Generator(x.device).manual_seed(0)
        count = x.shape[1] // 2
        return bipartite_soft_matching_random2d(x, size[1], size[0], 2, 2, count, generator=generator)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        merge, unmerge = self._merging(x, size)
        return unmerge(super().forward(merge(x), size))

    def expected(self, x: Tensor, size: tuple[int, int], tokens: Tensor) -> Tensor:
        """The attention of group means, by the groups that tomesd chose (for ``x`` in the layer's own type)."""
        weight = self.to_q.weight
        _, unmerge = self._merging(x.detach().to(weight.dtype), size)
        count = x.shape[1] - x.shape[1] // 2
        group = unmerge(torch.arange(count, device=x.device, dtype=torch.float64).expand(len(x), -1)[..., None])
        group = group[..., 0].long()
        y = []
        for image, own in zip(x, group, strict=True):
            members = torch.zeros(count, dtype=x.dtype, device=x.device).index_add_(
                0, own, torch.ones_like(image[:, 0])
            )
            means = (
                torch.zeros(count, x.shape[2], dtype=x.dtype, device=x.device).index_add(0, own, image)
                / members[:, None]
            )
            y.append(references.attention(means[None], self.projections, self.heads, own[tokens]))
        return torch.cat(y)


class Hyena(nn.Module):
    """An operator; a ``core`` one with projections like an ``attn1``'s, of which it is given the use."""

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__()
        self.operator, core = build(config), config.form == "core"
        self.projections = nn.ModuleList(Linear(config.dim, config.dim, bias=i == 3) for i in range(4 * core))
        make_parts_tell(self.operator)
        _make_outputs_tell(self.projections[3] if core else self.operator.out_proj)

    def _given(self) -> Given | None:
        return Given(*self.projections) if len(self.projections) else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.operator(x, size, self._given())

    def expected(self, x: Tensor, size: tuple[int, int], tokens: Tensor) -> Tensor:
        return self.operator.expected(x, size, tokens, self._given())


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as written, with the whole L x L matrix."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _sdp(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention's own package: version 3 where it is installed, else 2."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        from flash_attn import flash_attn_func
    y = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
    return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)  # some versions return the normaliser too


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """elu + 1, as anyone would write it."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2).unsqueeze(-1))


@dataclass(frozen=True)
class Kind:
    """One kind of layer. ``family``: "attention" (all compute the same), "peer", "hyena" or "floor".

    ``scratch``: bytes beyond a few times the input that it is known to need; ``power``: how its time grows
    with the number of tokens, both for skipping what cannot end well; ``refuses``: why it is not for a shape, or "".
    """

    name: str
    family: str
    build: Callable[[Shape], nn.Module]
    scratch: Callable[[Shape], int] = lambda shape: 0
    power: float = 1.1
    refuses: Callable[[Shape], str] = lambda shape: ""

    def missing(self, shape: Shape, backward: bool = False) -> str:
        """Why it cannot run at all on this device, in this type, with these heads, in a few words, or "";
        found by running it on a small grid, once. What fails in a Hyena layer is a fault, and is raised."""
        return _missing(self, replace(shape, height=8, width=8, batch=1, extent=(8, 8)), backward)


@lru_cache(maxsize=1024)
def _missing(kind: Kind, small: Shape, backward: bool) -> str:
    x = torch.randn(1, small.tokens, small.dim, device=small.device, dtype=small.dtype, requires_grad=backward)
    try:
        with torch.set_grad_enabled(backward):
            y = kind.build(small).to(small.device, small.dtype)(x, small.size)
            if backward:
                y.sum().backward()
    except ImportError as error:
        return f"{error.name or error} is not installed"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if kind.family == "hyena":
            raise
        return reason(error).split(". ")[0]
    return ""


def _attention(name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor], matrices: int = 0) -> Kind:
    return Kind(
        name,
        "attention",
        lambda shape: Attention(shape, attend),
        lambda shape: matrices * shape.heads * shape.squares(),
        2,
    )


def _operator(kind: str, operator: str, **choices: Any) -> Kind:
    def make(shape: Shape) -> nn.Module:
        height, width = shape.size if operator == "causal" else shape.extent
        return Hyena(
            OperatorConfig(shape.dim, height, width, attention_heads=shape.heads, operator=operator, **choices)
        )

    return Kind(kind, "peer" if operator in RIVALS else "hyena", make)


_BACKENDS = {
    "sdp-flash": SDPBackend.FLASH_ATTENTION,
    "sdp-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdp-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
KINDS = {
    kind.name: kind
    for kind in (
        _attention("naive", lambda q, k, v: softmax_attention(q, k, v), matrices=3),
        _attention("sdp-math", _sdp(SDPBackend.MATH), matrices=3),
        *(_attention(name, _sdp(backend)) for name, backend in _BACKENDS.items()),
        _attention("xformers", _xformers),
        _attention("flash-attn", _flash_attn),
        Kind("tomesd", "peer", lambda shape: MergedAttention(shape, F.scaled_dot_product_attention),
             lambda shape: shape.squares(0.4), 2),
        Kind("hypertile", "peer", lambda shape: TiledAttention(shape, F.scaled_dot_product_attention)),
        Kind("linear-elu", "peer", lambda shape: LinearAttention(shape, _linear)),
        *(_operator(name, name) for name in OPERATORS),
        _operator("states-core", "states", form="core"),
        Kind("projections", "floor", lambda shape: Projections(shape, lambda q, k, v: v)),
    )
}  # fmt: skip


def latent_cells(pixels: int, factor: int = 8) -> int:
    """Cells of the latent grid along ``pixels``."""
    return math.ceil(pixels / factor)
