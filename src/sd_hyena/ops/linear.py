"""Linear attention: the data-dependent global branch of ``Hyena2D``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised linear attention with feature map elu + 1 (https://arxiv.org/abs/2006.16236), O(L).

    q, k, v: (B, heads, head_dim, L). Returns (B, heads, head_dim, L) in v's dtype; sums over tokens are
    taken in float32. The reference is :func:`sd_hyena.ops.naive.linear_attention`.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(v.device.type, enabled=False):
        q, k = (F.elu(x.to(dtype)) + 1 for x in (q, k))
        state = v.to(dtype) @ k.transpose(-1, -2)
        normaliser = k.sum(-1, keepdim=True).transpose(-1, -2) @ q
        return ((state @ q) / normaliser).to(v.dtype)
