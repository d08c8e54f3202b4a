"""Linear maps of tokens, and linear attention, the data-dependent global branch of ``Hyena2D``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("elu", "exp")


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str = "elu") -> Tensor:
    """Normalised linear attention (https://arxiv.org/abs/2006.16236), O(L).

    The feature map makes positive features of q and k: ``elu`` is elu + 1, ``exp`` the exponential.
    q, k: (B, heads, features, L); v: (B, heads, head_dim, L). Returns (B, heads, head_dim, L) in v's dtype; sums
    over tokens are taken in float32. The reference is :func:`sd_hyena.ops.naive.linear_attention`.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(v.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        if feature_map == "exp":
            # Nothing overflows and the normaliser is at least 1: each feature's largest key moves to the
            # query, and the query's largest feature cancels in the ratio. Neither shift changes the result.
            largest = k.detach().amax(-1, keepdim=True)
            k = (k - largest).exp()
            q = q + largest
            q = (q - q.detach().amax(-2, keepdim=True)).exp()
        else:
            q, k = F.elu(q) + 1, F.elu(k) + 1
        state = v.to(dtype) @ k.transpose(-1, -2)
        normaliser = k.sum(-1, keepdim=True).transpose(-1, -2) @ q
        return ((state @ q) / normaliser).to(v.dtype)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``torch.nn.functional.linear`` on the fastest route the device has.

    On a CPU, float32 goes through oneDNN as a 1x1 convolution over tokens: PyTorch's own route is MKL,
    which leaves AVX-512 of other makers' processors unused (2 to 3 times slower there).

    x: (..., D); weight: (E, D); bias: (E,) or None. Returns (..., E).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _has_onednn() or x.numel() == 0:
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
