"""The published operator: equal to the reference implementation's recorded outputs."""

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file

import sd_hyena
from sd_hyena.nn import HyenaOperator

GOLDEN = __file__.rsplit("/", 2)[0] + "/golden"
FILES = ["legacy_IN01_64px", "legacy_IN02_order3"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reference", [False, True])
def test_golden_outputs(name, reference):
    operator = sd_hyena.load_operator(f"{GOLDEN}/{name}.safetensors")
    recorded = load_file(f"{GOLDEN}/{name}.io.safetensors")
    with torch.no_grad():
        for x, y in (("x", "y"), ("x_half", "y_half")):
            got = operator(recorded[x], reference=reference)
            torch.testing.assert_close(got, recorded[y], rtol=1e-5, atol=1e-5)


def test_longer_than_l_max_is_an_error_not_a_truncation():
    operator = HyenaOperator(8, l_max=16)
    assert operator(torch.randn(1, 16, 8)).shape == (1, 16, 8)
    with pytest.raises(ValueError, match="at most 16 tokens, got 17"):
        operator(torch.randn(1, 17, 8))


@pytest.mark.parametrize("choices", [{}, {"order": 3}, {"num_heads": 2}, {"order": 4, "num_heads": 4}])
@pytest.mark.parametrize("length", [1, 13, 24])
def test_fft_path_equals_reference_path(choices, length):
    torch.manual_seed(0)
    operator = HyenaOperator(8, l_max=24, **choices)
    x = torch.randn(2, length, 8)
    results = []
    for reference in (True, False):
        operator.zero_grad()
        y = operator(x, reference=reference)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in operator.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert_close("causal", a, b, 1e-4)


def test_blocks_reproduce_the_reference_codes_circular_transform():
    """safari transforms each block at twice its length with the filter of the whole sequence."""
    operator = HyenaOperator(4, 24, num_blocks=3).double()
    v, k = torch.randn(2, 1, 4, 24).double(), torch.randn(4, 24).double()
    blocks = v.unflatten(-1, (3, 8))
    spectrum = torch.fft.rfft(blocks, n=16) * torch.fft.rfft(k[:, :16], n=16)[:, None]
    expected = torch.fft.irfft(spectrum, n=16)[..., :8].flatten(-2)
    for reference in (True, False):
        assert_close("blocks", expected, operator._conv(v, k, reference), 1e-12)
    with pytest.raises(ValueError, match="equal blocks"):
        operator(torch.randn(1, 23, 4).double())


def test_causality_without_blocks():
    operator = HyenaOperator(8, 32).eval()
    x = torch.randn(1, 32, 8)
    changed = x.clone()
    changed[:, 20:] += 1
    with torch.no_grad():
        assert_close("past", operator(x)[:, :20], operator(changed)[:, :20], 1e-5)


@pytest.mark.parametrize("wrong", [{"order": 1}, {"num_heads": 3}, {"num_blocks": 5}])
def test_hyper_parameters_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=r"order|heads|blocks"):
        HyenaOperator(8, 24, **wrong)
