"""One attention layer head by head: how spread, how local and of what rank its attention matrices are, and what
an oracle that keeps only part of them leaves of the layer's output.

An oracle knows the true attention matrix A (rows sum to 1) and keeps

- ``window``: its entries within 7x7 cells, rows scaled to sum to 1 again;
- ``rank``: its best approximation of rank r;
- ``window+rank``: its entries within 7x7 cells, and the best approximation of rank r of all the others;
- ``displacement``: for each displacement between query and key, the mean over all pairs and samples of the batch,
  rows scaled to sum to 1.

No operator can know A, so these errors say what kind of operator can come close and about how close, before any
training. Low-rank approximations are by randomised SVD (Halko, Martinsson, Tropp, https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distill.losses import Distance

WINDOWS = (3, 7, 13)
WINDOW = 7
ORACLES = ("window", "rank", "window+rank", "displacement")
ENTRIES = 2**24  # of one attention matrix at once: larger grids are looked at from a sample of their queries
OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised SVD


class Layer:
    """Figures of one layer over any number of batches.

    Args:
        heads: of the attention.
        size: (h, w) of its grid.
        rank: of the low-rank oracles; an eighth of the cells if that is less.
    """

    def __init__(self, heads: int, size: tuple[int, int], rank: int) -> None:
        self.size, self.cells = size, size[0] * size[1]
        self.rank = max(1, min(rank, self.cells // 8))
        count = min(self.cells, max(1, ENTRIES // self.cells))
        chosen = torch.randperm(self.cells, generator=torch.Generator().manual_seed(0))[:count]
        self.queries = chosen.sort().values
        self.sums: list[dict[str, float]] = [{} for _ in range(heads)]
        self.batches = 0
        self.layer = {name: Distance() for name in ORACLES}
        self.heads = [{name: Distance() for name in ORACLES} for _ in range(heads)]
        h, w = size
        self.displacement = torch.zeros(heads, 2 * h - 1, 2 * w - 1)

    @torch.no_grad()
    def add(self, attention: Any, x: Tensor) -> None:
        """Takes in a batch. ``attention``: the layer, called through its modules, so that LoRA weights count;
        x: (B, L, D), what it saw."""
        q, k, v = (
            layer(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        queries = self.queries.to(x.device)
        inside, bins = self._geometry(queries)
        matrix = _matrix(attention.to_out[0], x).unflatten(0, (attention.heads, -1))
        left: dict[str, Tensor | float] = dict.fromkeys(ORACLES, 0.0)
        whole: Tensor | float = 0.0
        for head in range(attention.heads):
            scores = attention.scale * (q[:, head, queries] @ k[:, head].transpose(1, 2))
            a = scores.softmax(-1)
            self._describe(head, a, scores, inside)
            true = a @ v[:, head] @ matrix[head]
            whole = whole + true
            for name, kept in self._oracles(head, a, v[:, head], inside[WINDOW], bins):
                output = kept @ matrix[head]
                self.heads[head][name].add(output, true)
                left[name] = left[name] + output
        for name in ORACLES:
            self.layer[name].add(left[name], whole)
        self.batches += 1

    def _geometry(self, queries: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Which keys lie within each window of each query, and the number of each pair's displacement; (n, L)."""
        h, w = self.size
        cells = torch.arange(self.cells, device=queries.device)
        down = torch.div(cells, w, rounding_mode="floor") - torch.div(queries, w, rounding_mode="floor")[:, None]
        across = cells % w - (queries % w)[:, None]
        distance = torch.maximum(down.abs(), across.abs())
        return {size: distance <= size // 2 for size in WINDOWS}, (down + h - 1) * (2 * w - 1) + across + w - 1

    def _describe(self, head: int, a: Tensor, scores: Tensor, inside: dict[int, Tensor]) -> None:
        entropy = (scores.logsumexp(-1) - (a * scores).sum(-1)).mean()
        largest = torch.linalg.vector_norm(_low_rank(a, 1)[1], dim=-1).square()
        figures = {
            "entropy": (entropy / max(torch.tensor(self.cells).log().item(), 1e-12)).item(),
            "stable_rank": (a.square().sum((1, 2)) / largest).mean().item(),
        }
        for size, mask in inside.items():
            figures[f"mass_{size}"] = (a * mask).sum(-1).mean().item()
            figures[f"uniform_{size}"] = mask.float().mean().item()
        for name, value in figures.items():
            self.sums[head][name] = self.sums[head].get(name, 0.0) + value

    def _oracles(self, head: int, a: Tensor, v: Tensor, inside: Tensor, bins: Tensor) -> Any:
        """(name, what is left of A v) for each oracle; (B, n, d)."""
        near = a * inside
        yield "window", near @ v / near.sum(-1, keepdim=True).clamp_min(1e-30)
        left, right = _low_rank(a, self.rank)
        yield "rank", left @ (right @ v)
        left, right = _low_rank(a - near, self.rank)
        yield "window+rank", near @ v + left @ (right @ v)
        counts = torch.bincount(bins.flatten(), minlength=self.displacement[head].numel())
        total = torch.bincount(bins.flatten(), a.mean(0).flatten(), minlength=len(counts))
        mean = total / counts.clamp_min(1)
        self.displacement[head] += mean.view(self.displacement[head].shape).float().cpu()
        kernel = mean[bins].float()
        yield "displacement", (kernel / kernel.sum(-1, keepdim=True)) @ v

    def figures(self) -> dict[str, Any]:
        """Means over the batches: ``errors`` of the layer; for each of ``heads`` its figures and ``errors``."""
        heads = []
        for sums, distances in zip(self.sums, self.heads, strict=True):
            record: dict[str, Any] = {name: value / self.batches for name, value in sums.items()}
            record["errors"] = {name: d.figures()["relative_error"] for name, d in distances.items()}
            heads.append(record)
        errors = {name: d.figures()["relative_error"] for name, d in self.layer.items()}
        return {"errors": errors, "heads": heads}


def _low_rank(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (B, n, r) and (B, r, L) of the best approximation of rank r; the second holds the singular values."""
    with torch.random.fork_rng(devices=[a.device] if a.is_cuda else []):
        torch.manual_seed(0)
        columns = min(rank + OVERSAMPLING, *a.shape[1:])
        u, s, v = torch.svd_lowrank(a, q=columns, niter=ITERATIONS)
    return u[..., :rank], (v * s[:, None])[..., :rank].transpose(1, 2)


def _matrix(layer: Any, x: Tensor) -> Tensor:
    """(inner, D): what a linear layer multiplies by, a LoRA on it included."""
    inner = layer.in_features
    unit = torch.eye(inner, dtype=x.dtype, device=x.device)
    return (layer(unit) - layer(torch.zeros_like(unit[:1]))).float()
