"""The published operator: equal to the reference implementation's recorded outputs."""

import pytest
import torch
from conftest import assert_close, assert_gradients_close
from safetensors.torch import load_file

import sd_hyena
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.ops import fft, naive

GOLDEN = __file__.rsplit("/", 2)[0] + "/golden"
FILES = ["legacy_IN01_64px", "legacy_IN02_order3"]


def make(dim, length, **choices):
    return build(OperatorConfig(dim, length, 1, operator="causal", **choices))


@pytest.mark.parametrize("name", FILES)
def test_golden_outputs(name):
    operator = sd_hyena.load_operator(f"{GOLDEN}/{name}.safetensors")
    recorded = load_file(f"{GOLDEN}/{name}.io.safetensors")
    with torch.no_grad():
        for x, y in (("x", "y"), ("x_half", "y_half")):
            size = recorded[x].shape[1], 1
            for got in (operator(recorded[x], size), operator.expected(recorded[x], size).float()):
                torch.testing.assert_close(got, recorded[y], rtol=1e-5, atol=1e-5)


def test_longer_than_l_max_is_an_error_not_a_truncation():
    operator = make(8, 16)
    assert operator(torch.randn(1, 16, 8), (16, 1)).shape == (1, 16, 8)
    with pytest.raises(ValueError, match="at most 16 tokens, not 17"):
        operator(torch.randn(1, 17, 8), (17, 1))


@pytest.mark.parametrize(
    "choices", [{}, {"hyena_order": 3}, {"hyena_num_heads": 2}, {"hyena_order": 4, "hyena_num_heads": 4}]
)
@pytest.mark.parametrize("length", [1, 13, 24])
def test_outputs_and_gradients_equal_the_definition(choices, length):
    torch.manual_seed(0)
    operator = make(8, 24, **choices)
    assert_gradients_close(operator, torch.randn(2, length, 8), (length, 1), None, 1e-5)


def test_blocks_reproduce_the_reference_codes_circular_transform():
    """safari transforms each block at twice its length with the filter of the whole sequence."""
    operator = make(4, 24, hyena_num_blocks=3).double()
    v, k = torch.randn(2, 1, 4, 24).double(), torch.randn(4, 24).double()
    blocks = v.unflatten(-1, (3, 8))
    spectrum = torch.fft.rfft(blocks, n=16) * torch.fft.rfft(k[:, :16], n=16)[:, None]
    expected = torch.fft.irfft(spectrum, n=16)[..., :8].flatten(-2)
    for conv in (fft.causal_conv1d, naive.causal_conv1d):
        assert_close("blocks", expected, operator._conv(v, k, conv), 1e-12)
    with pytest.raises(ValueError, match="equal blocks"):
        operator(torch.randn(1, 23, 4).double(), (23, 1))


def test_causality_without_blocks():
    operator = make(8, 32).eval()
    x = torch.randn(1, 32, 8)
    changed = x.clone()
    changed[:, 20:] += 1
    with torch.no_grad():
        assert_close("past", operator(x, (32, 1))[:, :20], operator(changed, (32, 1))[:, :20], 1e-5)


@pytest.mark.parametrize("wrong", [{"hyena_order": 1}, {"hyena_num_heads": 3}, {"hyena_num_blocks": 5}])
def test_hyper_parameters_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=r"order|heads|blocks"):
        make(8, 24, **wrong)
