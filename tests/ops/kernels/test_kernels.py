"""Triton kernels against float64 definitions: interpreted here, compiled with SD_HYENA_TEST_DEVICE=cuda.

What a kernel writes starts as NaN, so that a cell it leaves out is seen.
"""

import pytest
import torch
from conftest import DEVICE, assert_close

from sd_hyena.ops import environment, gemm_conv, naive

triton = pytest.importorskip("triton", reason="Triton is not installed")
from sd_hyena.ops.kernels import columns, features, flash, launch, short_gate  # noqa: E402 - needs it

GRIDS = [(1, 1), (13, 4), (9, 23), (33, 40)]
if DEVICE != "cpu":
    GRIDS += [(64, 64), (96, 96), (31, 127), (128, 128)]
LARGE = [(160, 160), (150, 131), (256, 256), (512, 320)] if DEVICE != "cpu" else []
HALF, FULL = 2e-3, 2e-6


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def convolution(grid, reach, dtype, channels=3):
    """(u, spectrum, radius, expected)"""
    torch.manual_seed(0)
    ry, rx = min(reach, grid[0] - 1), min(reach, grid[1] - 1)
    u, k, bias = randn(2, channels, *grid, dtype=dtype), randn(channels, 2 * ry + 1, 2 * rx + 1), randn(channels)
    spectrum = gemm_conv.kernel_spectrum(k, k.shape, grid, bias, dtype=dtype)
    if max(grid) <= 40:
        expected = naive.long_conv2d(*(t.double().cpu() for t in (u, k, bias, 0 * bias))).to(DEVICE)
    else:
        exact = gemm_conv.kernel_spectrum(k.double(), k.shape, grid, bias.double())
        expected = gemm_conv.convolve(u.double(), exact, (ry, rx))
    return u, spectrum, (ry, rx), expected


def types(grid):
    """Compiled kernels multiply in float16; in the interpreter float32 shows that the sums are right exactly."""
    return [(torch.float16, HALF)] + ([(torch.float32, FULL)] if DEVICE == "cpu" else [])


@pytest.mark.parametrize(("grid", "reach"), [*((grid, 1000) for grid in GRIDS), ((9, 23), 2)])
def test_flash_equals_definition(grid, reach):
    for dtype, ratio in types(grid):
        u, spectrum, radius, expected = convolution(grid, reach, dtype)
        got = flash.convolve(u, spectrum, radius)
        assert got.dtype == dtype
        assert_close(f"plain {dtype}", expected, got, ratio)
        q, scale = randn(*u.shape, dtype=dtype), randn(3)
        gated = expected * (1 + scale[:, None, None].double() * q.double())
        assert_close(f"gated {dtype}", gated, flash.convolve(u, spectrum, radius, (q, scale)), ratio)
        assert torch.equal(got, flash.convolve(u, spectrum, radius)), "not the same twice"


def test_flash_writes_bfloat16_among_other_channels():
    u, spectrum, radius, expected = convolution((17, 11), 1000, torch.float16)
    whole = torch.zeros(2, 5, 17, 11, dtype=torch.bfloat16, device=DEVICE)
    flash.convolve(u, spectrum, radius, out=whole[:, 1:4])
    assert_close("bfloat16", expected, whole[:, 1:4], 8e-3)
    assert not whole[:, [0, 4]].any(), "other channels are left alone"


@pytest.mark.parametrize(("grid", "reach"), [*((grid, 1000) for grid in (*GRIDS, *LARGE)), ((9, 23), 2)])
def test_columns_equal_definition_and_twin(grid, reach):
    for dtype, ratio in types(grid):
        u, spectrum, radius, expected = convolution(grid, reach, dtype)
        constants = gemm_conv.matrices(grid, gemm_conv.lengths(grid, radius), dtype, u.device)
        rows = gemm_conv.to_columns(u, constants)
        twin = gemm_conv.columns(rows, spectrum, constants, grid[0])
        got = columns.columns(rows.clone(), spectrum, constants, grid[0])
        assert_close(f"twin {dtype}", twin, got, ratio)
        assert torch.equal(got, columns.columns(rows.clone(), spectrum, constants, grid[0])), "not the same twice"
        assert_close(f"definition {dtype}", expected, gemm_conv.from_columns(got, constants), ratio)


def columns_by(kernel):
    """What ``columns`` returns with its kernel replaced by another."""
    u, spectrum, radius, _ = convolution((13, 4), 1000, torch.float16)
    constants = gemm_conv.matrices((13, 4), gemm_conv.lengths((13, 4), radius), torch.float16, u.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_columns", kernel)
        return columns.columns(gemm_conv.to_columns(u, constants), spectrum, constants, 13)


def tuned(bench):
    """The kernel with two candidates, tried out by ``bench``."""
    own = columns._columns
    how = {"restore_value": own.restore_value, "do_bench": bench}
    return launch.Tuned(triton.autotune([own.configs[0]] * 2, own.keys, **how)(own.fn))


def test_tuning_leaves_no_trace(monkeypatch):
    """The tuner runs a kernel many times before it counts: what is written over must be put back."""
    monkeypatch.delenv(environment.TUNE, raising=False)
    calls = []

    def bench(call, quantiles):
        for _ in range(3):
            call()
        calls.append(call)
        return [1.0, 1.0, 1.0]

    assert torch.equal(columns_by(tuned(bench)), columns_by(columns._columns))
    assert calls


def test_tuning_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(environment.TUNE, "0")
    assert torch.equal(columns_by(tuned(lambda *_, **__: pytest.fail("tried"))), columns_by(columns._columns))


@pytest.mark.parametrize(
    ("grid", "taps", "keys"), [((1, 1), 3, True), ((13, 4), 5, False), ((9, 23), 1, True), ((33, 40), 3, False)]
)
def test_short_gate_equals_twin(grid, taps, keys):
    torch.manual_seed(0)
    for dtype, ratio in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        for offset in (None,) if dtype == torch.float16 else (randn(12),):
            p = randn(2, 12, grid[0] * grid[1], dtype=dtype)
            rest = randn(12, taps, taps), randn(12), randn(4)
            exact = [None if t is None else t.double() for t in (p, offset, *rest)]
            expected = short_gate.reference(*exact, grid, torch.float64, keys)
            got = short_gate.short_gate(p, offset, *rest, grid, dtype, keys)
            assert (got[2] is None) == (not keys)
            for name, a, b in zip(("u", "q", "k"), expected, got, strict=True):
                if a is not None:
                    assert b.dtype == dtype
                    assert_close(f"{name} {dtype}", a, b, ratio)


@pytest.mark.parametrize("shape", [(1, 5), (7, 300), (3, 1001)])
def test_gate(shape):
    y, q, scale = randn(2, 3, *shape), randn(2, 3, *shape), randn(3)
    expected, whole = (1 + scale[:, None, None] * q) * y, randn(2, 5, *shape).zero_()
    assert_close("gate", expected, short_gate.gate(y, q, scale), 1e-6)
    assert_close("among others", expected, short_gate.gate(y, q, scale, whole[:, 1:4]), 1e-6)
    assert not whole[:, [0, 4]].any()


@pytest.mark.parametrize(
    ("grid", "heads", "width", "multiple"),
    [((1, 1), 1, 16, 1), ((5, 3), 2, 8, 2), ((17, 11), 2, 10, 1), ((33, 40), 1, 20, 4)],
)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_linear_attention_equals_twin(grid, heads, width, multiple, size):
    torch.manual_seed(0)
    for dtype, ratio in types(grid):
        c = heads * width
        q, k, u, y = (randn(2, c, *grid, dtype=dtype) for _ in range(4))
        maps = [
            (size * randn(heads, multiple * width, width) * width**-0.5, randn(heads, multiple * width, 1))
            for _ in range(2)
        ]
        gain, scale = randn(c), randn(c)
        exact = [tuple(t.double() for t in pair) for pair in maps]
        parts = [t.double() for t in (q, k, u, y)]
        expected = features.reference(*parts, *exact, gain.double(), scale.double())
        got = features.attend_and_gate(q, k, u, y, *maps, gain, scale)
        assert got.dtype == dtype
        whole = randn(2, c + 2, *grid, dtype=dtype).zero_()
        features.attend_and_gate(q, k, u, y, *maps, gain, scale, whole[:, 1:-1])
        assert torch.equal(whole[:, 1:-1], got), "among other channels"
        assert not whole[:, [0, -1]].any()
        # Large logarithms cost float32 digits; float16's products keep theirs, being made in two parts.
        assert_close(f"{dtype}", expected, got, 10 * ratio if size > 1 and ratio == FULL else ratio)


def test_linear_attention_over_many_shares(monkeypatch):
    """Sums of several programs are joined, whatever their largest features are."""
    torch.manual_seed(0)
    grid, c = (50, 60), 16
    q, k, u, y = (randn(1, c, *grid) for _ in range(4))
    k[..., 30:, :] += 20
    maps = [(randn(1, 16, c) * 0.5, randn(1, 16, 1)) for _ in range(2)]
    gain, scale = randn(c), randn(c)
    exact = [tuple(t.double() for t in pair) for pair in maps]
    expected = features.reference(*(t.double() for t in (q, k, u, y)), *exact, gain.double(), scale.double())
    ratio = 1e-5 if DEVICE == "cpu" else 3e-3
    assert_close("shares", expected, features.attend_and_gate(q, k, u, y, *maps, gain, scale), ratio)
