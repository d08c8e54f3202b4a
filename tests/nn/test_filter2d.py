"""The implicit filter against its formula, offset by offset."""

import math

import pytest
import torch

from sd_hyena.nn.filter2d import BANDS, ImplicitFilter2d


def by_hand(f, dy, dx, channel, unit, amplitude):
    """``K_c(dy, dx)``: MLP of the coordinate features, times the window and the amplitude."""
    y, x = dy / unit[0], dx / unit[1]
    r = math.hypot(y, x)
    phases = [a * math.pi * 2.0**k for a in (y, x) for k in range(BANDS)]
    z = torch.tensor([y, x, r, *map(math.sin, phases), *map(math.cos, phases)], dtype=torch.float64)
    first, sine_1, second, sine_2 = f.mlp
    z = torch.sin(sine_1.freq[0] * (first.weight @ z + first.bias))
    z = torch.sin(sine_2.freq[0] * (second.weight @ z + second.bias))
    tap = f.head.weight[channel] @ z + f.head.bias[channel]
    return tap * math.exp(-abs(f.window.rate[channel].item()) * r) * amplitude


@pytest.mark.parametrize(("scaling", "grid"), [("stretch", (5, 7)), ("stretch", (8, 3)), ("extend", (5, 7))])
@pytest.mark.parametrize("gradients", [True, False])
def test_kernels_follow_the_formula(scaling, grid, gradients):
    torch.manual_seed(0)
    f = ImplicitFilter2d(4, 6, (4, 6), scaling).double()
    with torch.set_grad_enabled(gradients):
        kernels = f(grid).detach()
    ry, rx = f.radius(grid)
    assert kernels.shape == (4, 2 * ry + 1, 2 * rx + 1)
    unit, amplitude = ((4, 6), 1.0) if scaling == "extend" else (grid, 24 / (grid[0] * grid[1]))
    with torch.no_grad():
        for dy in range(-ry, ry + 1):
            for dx in range(-rx, rx + 1):
                for channel in range(4):
                    expected = by_hand(f, dy, dx, channel, unit, amplitude)
                    assert torch.isclose(kernels[channel, dy + ry, dx + rx], expected, atol=1e-12)
