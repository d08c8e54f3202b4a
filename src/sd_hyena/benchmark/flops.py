"""Floating point operations of one layer, counted from the formulas; a multiplication and an addition are two."""

from __future__ import annotations

import math

from ..nn import OperatorConfig
from ..ops import gemm_conv
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
        each = fft_convolution_flops(grid, (min(grid[0], reach[0]) - 1, min(grid[1], reach[1]) - 1))
    gates = 3 * config.order * tokens
    return total + inner * ((config.order - 1) * convolutions * each + gates)


def fft_convolution_flops(grid: tuple[int, int], radius: tuple[int, int]) -> int:
    """One plane convolved by fast transforms, its kernel's spectrum at hand."""
    return _transforms(fast_length(grid[0] + radius[0]) * fast_length(grid[1] + radius[1]))


def gemm_convolution_flops(grid: tuple[int, int], radius: tuple[int, int]) -> int:
    """The same by the matrix products of :mod:`sd_hyena.ops.gemm_conv`: rows, then columns, there and back."""
    (h, w), size = grid, gemm_conv.lengths(grid, radius)
    rows = 2 * h * w * 2 * size.half
    # Even and odd rows; cosines and sines; real and imaginary parts.
    columns = 8 * 2 * size.quarter * -(-h // 2) * size.half
    return 2 * (rows + columns)


def _linear_attention(config: OperatorConfig, tokens: int, inner: int) -> int:
    width = inner // config.attention_heads
    if config.feature_map == "elu":
        return 4 * tokens * inner * width  # the state, and its products with q
    features = config.num_features * width
    return 4 * tokens * inner * features * 2  # the maps of q and k as well


def _transforms(points: int) -> int:
    """Real transform there and back, and the complex product between them."""
    return int(2 * 2.5 * points * math.log2(points) + 3 * points)
