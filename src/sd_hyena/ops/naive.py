"""Reference definitions, written for reading. Every fast path in this package is held to them.

Those with ``tokens`` return the result at these tokens alone, O(L) each, so that they can be asked at any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
POWERS = {"cubed_relu": 3, "squared_relu": 2}  # of the positive part
FLOOR = 1e-4  # so that nobody attends to nothing


def causal_conv1d(u: Tensor, k: Tensor, tokens: Tensor | None = None) -> Tensor:
    """``y[t] = sum_{s <= t} k[t - s] u[s]`` at ``tokens``, all unless given.

    u: (..., D, L); k: (D, L) or (D, K) with any number of taps K. Returns (..., D, S).
    """
    at = torch.arange(u.shape[-1], device=u.device)
    taps = F.pad(k, (0, max(0, len(at) - k.shape[-1]) + 1))  # the last is a zero, for what is yet to come
    lag = (at if tokens is None else tokens)[:, None] - at
    return torch.einsum("dts,...ds->...dt", taps[:, torch.where(lag >= 0, lag, taps.shape[-1] - 1)], u)


def conv2d(u: Tensor, k: Tensor, tokens: Tensor) -> Tensor:
    """``y[i, j] = sum_{p, q} K[i - p, j - q] u[p, q]`` at ``tokens``, zero outside the grid.

    u: (B, D, h, w); k: (D, 2 ry + 1, 2 rx + 1), whose centre tap is offset (0, 0). Returns (B, S, D).
    """
    h, w = u.shape[-2:]
    ry, rx = k.shape[-2] // 2, k.shape[-1] // 2
    dy, dx = offsets((h, w), tokens)
    inside = (dy.abs() <= ry) & (dx.abs() <= rx)
    taps = k[:, (dy + ry).clamp(0, 2 * ry), (dx + rx).clamp(0, 2 * rx)] * inside
    return torch.einsum("dsl,bdl->bsd", taps, u.flatten(2))


def offsets(size: Size, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns from every cell to each of ``tokens``, (S, L) each."""
    h, w = size
    cells = torch.arange(h * w, device=tokens.device)
    return tokens[:, None] // w - cells // w, tokens[:, None] % w - cells % w


def features(z: Tensor, feature_map: str) -> Tensor:
    """Positive features: ``relu(z)^3 + 1e-4`` or its square, ``exp(z)`` with z within 30 of 0, or ``elu(z) + 1``."""
    if feature_map in POWERS:
        return z.relu().pow(POWERS[feature_map]) + FLOOR
    if feature_map == "exp":
        return z.clamp(-30, 30).exp()
    return F.elu(z) + 1


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """``y_i = sum_j w_ij <f(q_i), f(k_j)> v_j / sum_j w_ij <f(q_i), f(k_j)>`` at ``tokens``
    (https://arxiv.org/abs/2006.16236; w is multi-head Hyena's filter, https://arxiv.org/abs/2310.18780).

    q, k, v: (B, H, L, d); weights: (H, S, L), 1 unless given. Returns (B, S, H d).
    """
    products = features(q[:, :, tokens], feature_map) @ features(k, feature_map).transpose(-1, -2)
    if weights is not None:
        products = products * weights
    return ((products / products.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax attention at ``tokens`` to the cells that are ``seen``, (H, S, L), all unless given.

    q, k, v: (B, H, L, d). Returns (B, S, H d).
    """
    scores = q[:, :, tokens] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
