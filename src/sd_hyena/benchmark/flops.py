"""Floating point operations of one layer, counted from the formulas; a multiplication and an addition are two."""

from __future__ import annotations

import math

from ..nn import OperatorConfig
from ..ops.fft import fast_length


def attention_flops(dim: int, tokens: int) -> int:
    """Self-attention with its four projections, one image."""
    return 8 * tokens * dim**2 + 4 * tokens**2 * dim


def operator_flops(config: OperatorConfig, grid: tuple[int, int], convolutions: int = 1) -> int:
    """One image through an operator at inference, spectra at hand; (h, w) = ``grid``.

    ``convolutions``: how often each channel is convolved. A complex transform of n points counts 5 n log2 n.
    """
    tokens, inner = grid[0] * grid[1], config.inner_dim or config.dim
    parts = 3 if config.operator == "linear" else config.order + 1
    total = 2 * tokens * inner * config.dim * (parts + 1)  # projections in and out
    if config.operator == "linear" or (config.operator == "hyena2d" and config.global_branch == "linear"):
        total += _linear_attention(config, tokens, inner)
    if config.operator == "linear":
        return total
    taps = config.short_filter_order if config.operator == "causal" else config.short_filter_order**2
    total += 2 * tokens * inner * (config.order + 1) * taps
    if config.operator == "causal":
        each = _transforms(2 * tokens)
    else:
        reach = grid if config.scaling == "stretch" else (config.height, config.width)
        m, n = (fast_length(side + min(side, r) - 1) for side, r in zip(grid, reach, strict=True))
        each = _transforms(m * n)
    gates = 3 * config.order * tokens
    return total + inner * ((config.order - 1) * convolutions * each + gates)


def _linear_attention(config: OperatorConfig, tokens: int, inner: int) -> int:
    width = inner // config.attention_heads
    if config.feature_map == "elu":
        return 4 * tokens * inner * width  # the state, and its products with q
    features = config.num_features * width
    return 4 * tokens * inner * features * 2  # the maps of q and k as well


def _transforms(points: int) -> int:
    """Real transform there and back, and the complex product between them."""
    return int(2 * 2.5 * points * math.log2(points) + 3 * points)
