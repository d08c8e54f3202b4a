"""Reference definitions, O(L^2), written for reading. Every fast path in this package is held to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(u: Tensor, k: Tensor) -> Tensor:
    """``y[t] = sum_{s <= t} k[t - s] u[s]``.

    u: (..., D, L); k: (D, L) or (D, K) with any number of taps K. Returns (..., D, L).
    """
    length = u.shape[-1]
    taps = F.pad(k, (0, max(0, length - k.shape[-1])))
    at = torch.arange(length, device=u.device)
    lag = at[:, None] - at[None, :]
    matrix = torch.where(lag >= 0, taps[:, lag.clamp(min=0)], taps.new_zeros(()))
    return torch.einsum("dts,...ds->...dt", matrix, u)


def conv2d(u: Tensor, k: Tensor) -> Tensor:
    """``y[i, j] = sum_{p, q} K[i - p, j - q] u[p, q]``, zero outside the grid.

    u: (B, D, h, w); k: (D, 2 ry + 1, 2 rx + 1), whose centre tap is offset (0, 0). Returns (B, D, h, w).
    """
    h, w = u.shape[-2:]
    ry, rx = k.shape[-2] // 2, k.shape[-1] // 2
    rows, columns = torch.arange(h, device=u.device), torch.arange(w, device=u.device)
    dy, dx = rows[:, None] - rows[None, :], columns[:, None] - columns[None, :]
    inside = (dy.abs() <= ry)[:, :, None, None] & (dx.abs() <= rx)[None, None]
    matrix = k[:, (dy + ry).clamp(0, 2 * ry)[:, :, None, None], (dx + rx).clamp(0, 2 * rx)[None, None]]
    return torch.einsum("dipjq,bdpq->bdij", matrix * inside, u)


def long_conv2d(u: Tensor, k: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """``K ** u + bias * u + gain * mean(u)`` over the grid.

    u: (B, D, h, w); k: (D, 2 ry + 1, 2 rx + 1); bias, gain: (D,). Returns (B, D, h, w).
    """
    bias, gain = bias[:, None, None], gain[:, None, None]
    return conv2d(u, k) + bias * u + gain * u.mean((-2, -1), keepdim=True)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str = "elu") -> Tensor:
    """``y_i = sum_j <f(q_i), f(k_j)> v_j / sum_j <f(q_i), f(k_j)>`` with f = elu + 1, or exp.

    q, k: (B, heads, features, L); v: (B, heads, head_dim, L). Returns (B, heads, head_dim, L).
    """
    q, k = (x.exp() if feature_map == "exp" else F.elu(x) + 1 for x in (q, k))
    weights = torch.einsum("bhdi,bhdj->bhij", q, k)
    return torch.einsum("bhij,bhdj->bhdi", weights / weights.sum(-1, keepdim=True), v)
