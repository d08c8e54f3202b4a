"""A near filter beside linear attention: cheap where attention looks at its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import OperatorConfig
from ..ops import naive
from ..ops.mix import Call, mix, planes
from .linear import LinearAttention, Parts
from .operator import Projection, Size
from .teacher import projections_of

MAX_FIT_TOKENS = 2**16  # of a record that a start is fitted to, in whole images
RIDGE = 1e-3  # of the mean square of what is regressed on


class Near(LinearAttention):
    """Linear attention plus ``near``, a depthwise filter of some cells on v: Hyena's short explicit filter
    (StripedHyena 2's Hyena-SE, https://arxiv.org/abs/2503.01868) in two dimensions."""

    branches: tuple[str, ...] = ("near", "global")
    rates = {"near.": 30.0}  # noqa: RUF012 - a few taps, starting close to nothing, have far to go

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__(config)
        edge, inner = config.near, config.inner
        self.near = nn.Conv2d(inner, inner, edge, padding=edge // 2, groups=inner, bias=False) if edge else None
        if self.near is not None:
            nn.init.zeros_(self.near.weight)

    def call(self, parts: Parts, size: Size) -> Call:
        call = super().call(parts, size)
        if self.near is None or self.off == "near":
            return call
        return call._replace(near=self.near, reach=self.config.near // 2)

    def run(self, x: Tensor, size: Size, projections: Iterable[Projection] | None) -> Tensor:
        if self.off != "global":
            return super().run(x, size, projections)
        (_, _, v), out = self.project(x, projections)
        return out(0 * v.flatten(2) if self.near is None else self.near(planes(v, size)).flatten(2).transpose(1, 2))

    def define(self, parts: Parts, size: Size, tokens: Tensor) -> Tensor:
        y = super().define(parts, size, tokens)
        if self.near is None:
            return y
        # A convolution layer of PyTorch correlates: its kernel is turned round.
        return y + naive.conv2d(planes(parts[2], size), self.near.weight[:, 0].flip(-1, -2), tokens)

    @torch.no_grad()
    def start_from(self, attention: nn.Module, records: Sequence[tuple[Tensor, Size]]) -> None:
        """Projections are the teacher's; the near filter, one for all channels of a head, is the least squares fit
        to what the global branch leaves of the teacher's attention."""
        super().start_from(attention, records)
        if self.near is None:
            return
        self.near.weight.zero_()
        edge, width = self.config.near, self.width
        gram = torch.zeros(self.heads, edge**2, edge**2, device=self.near.weight.device)
        product = torch.zeros(self.heads, edge**2, device=gram.device)
        for parts, size, wanted in self.samples(attention, records):
            left = (wanted - self.attend(parts, size)).permute(2, 0, 3, 1).flatten(1).float()  # H, B d L
            cells = planes(parts[2], size).float().flatten(0, 1)[:, None]
            seen = F.unfold(cells, edge, padding=edge // 2).unflatten(0, (len(wanted), self.heads, width))
            seen = seen.permute(1, 3, 0, 2, 4).flatten(2)  # H, taps, B d L
            gram += seen @ seen.transpose(1, 2)
            product += (seen @ left[..., None])[..., 0]
        if records:
            ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            taps = torch.linalg.solve(gram + ridge * torch.eye(edge**2, device=gram.device), product)
            self.near.weight.copy_(taps.view(self.heads, 1, edge, edge).repeat_interleave(width, 0))

    def attend(self, parts: Parts, size: Size) -> Tensor:
        """What everything but the near filter says, (B, L, H, d)."""
        return mix(self.call(parts, size)._replace(near=None)).unflatten(-1, (self.heads, self.width))

    def samples(
        self, attention: nn.Module, records: Sequence[tuple[Tensor, Size]]
    ) -> Iterator[tuple[Parts, Size, Tensor]]:
        """For each record: q, k and v, its grid, and what the teacher's heads say, (B, L, H, d)."""
        to_q, to_k, to_v, _ = projections_of(attention)
        for x, size in records:
            x = x[: max(1, MAX_FIT_TOKENS // x.shape[1])]
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (to_q, to_k, to_v))
            wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            own = x if self.core else x.to(self.in_proj.weight.dtype)  # a teacher may be in half precision
            yield self.project(own, self.teacher_projections(attention))[0], size, wanted

    def flops(self, size: Size) -> int:
        return super().flops(size) + 2 * size[0] * size[1] * self.inner_dim * self.config.near**2
