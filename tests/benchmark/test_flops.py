"""Counted operations against PyTorch's own counter, where that sees everything, and against the formulas."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_hyena.benchmark.flops import attention_flops, gemm_convolution_flops, operator_flops
from sd_hyena.nn import OperatorConfig
from sd_hyena.ops import gemm_conv


@pytest.mark.parametrize(("feature_map", "num_features"), [("elu", 1), ("exp", 2)])
def test_linear_attention_is_all_products_of_matrices(feature_map, num_features):
    config = OperatorConfig(
        32, 8, 8, operator="linear", attention_heads=2, feature_map=feature_map, num_features=num_features
    )
    operator, x = config.build(), torch.randn(1, 64, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        operator(x, (8, 8))
    normaliser = 2 * 64 * 32 * (num_features if feature_map == "exp" else 1)
    assert counter.get_total_flops() == operator_flops(config, (8, 8)) + normaliser


def test_attention_is_four_projections_and_two_products():
    assert attention_flops(320, 4096) == 4 * 2 * 4096 * 320**2 + 2 * 2 * 4096**2 * 320


def test_hyena_counts_its_transforms():
    none = OperatorConfig(32, 8, 8, global_branch="none", short_filter_order=1)
    points = 15 * 15 + 31  # 8 + 7 cells an axis, made 16 for the transform
    each = 5 * 256 * math.log2(256) + 3 * 256
    assert points == 256
    assert operator_flops(none, (8, 8)) == 4 * 2 * 64 * 32**2 + 2 * 64 * 96 + 32 * (each + 6 * 64)
    twice = operator_flops(none, (8, 8), convolutions=2)
    assert twice - operator_flops(none, (8, 8)) == 32 * each


@pytest.mark.parametrize(("grid", "radius"), [((9, 23), (8, 22)), ((16, 10), (3, 4))])
def test_convolution_in_gemm_form_is_all_products_of_matrices(grid, radius):
    u, k = torch.randn(2, 3, *grid), torch.randn(3, 2 * radius[0] + 1, 2 * radius[1] + 1)
    spectrum = gemm_conv.kernel_spectrum(k, k.shape, grid, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        gemm_conv.convolve(u, spectrum, radius, torch.float32)
    even = grid[0] % 2 == 0  # with an odd height, the rows of the odd half are one fewer than counted
    counted, formula = counter.get_total_flops(), 2 * 3 * gemm_convolution_flops(grid, radius)
    assert counted == formula if even else 0.9 * formula < counted < formula
