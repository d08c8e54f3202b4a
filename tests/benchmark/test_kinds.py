"""Every kind is held to its definition at the very shape timed, and a broken kernel is caught."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sd_hyena.benchmark import kinds, references
from sd_hyena.benchmark.kinds import KINDS, Shape
from sd_hyena.benchmark.measure import Limits, check, measure
from sd_hyena.benchmark.settings import ALL_KINDS, GROUPS
from sd_hyena.errors import SdHyenaError
from sd_hyena.nn import long
from sd_hyena.ops import fft
from sd_hyena.ops.mix import cpu, plain

CPU = torch.device("cpu")


def shape(grid=(10, 12), dtype=torch.float32, batch=2):
    return Shape(16, 2, *grid, batch, dtype, CPU, (24, 24))


def available(kind):
    if reason := KINDS[kind].missing(shape()):
        pytest.skip(f"{kind}: {reason}")


def test_names_and_groups_cover_the_kinds():
    assert tuple(KINDS) == ALL_KINDS
    assert set().union(*GROUPS.values()) == set(ALL_KINDS)
    assert {kind for kind, k in KINDS.items() if k.family == "attention"} == set(GROUPS["attention"])


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("grid", [(2, 2), (7, 5), (64, 33)])
def test_right_kernels_pass(kind, grid):
    available(kind)
    assert check(kind, shape(grid), backward=grid != (64, 33)) < 1e-5


@pytest.mark.parametrize(
    "kind", ["sdp-math", "linear-elu", "states", "near", "windows", "long", "causal", "states-core"]
)
def test_bfloat16_passes(kind):
    assert check(kind, shape(dtype=torch.bfloat16), backward=True) < 5e-2


@pytest.mark.parametrize(("package", "normaliser"), [("flash_attn", False), ("flash_attn_interface", True)])
def test_flash_attention_is_called_as_its_packages_ask(package, normaliser, monkeypatch):
    """Tokens before heads; version 3 may return the normaliser too."""

    def flash_attn_func(q, k, v):
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        return (y, None) if normaliser else y

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(flash_attn_func=flash_attn_func))
    assert check("flash-attn", shape()) < 1e-5


def scaled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.01


BREAKERS = {
    "naive": (kinds, "softmax_attention"),
    "xformers": (kinds, "_xformers"),
    "flash-attn": (kinds, "_flash_attn"),
    "linear-elu": (kinds, "_linear"),
    "long": (long, "long_conv2d"),
    "causal": (fft, "causal_conv1d"),
    "projections": (kinds.Projections, "forward"),
} | dict.fromkeys((*GROUPS["sdp"], "tomesd", "hypertile"), (F, "scaled_dot_product_attention"))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_broken_kernels_are_caught_before_any_time_is_reported(kind, monkeypatch):
    available(kind)
    owner, name = BREAKERS.get(kind, (cpu, "run"))
    monkeypatch.setattr(owner, name, scaled(getattr(owner, name)))
    with pytest.raises(SdHyenaError, match=f"{kind} is off by .* no times are reported"):
        measure(shape(), (80, 96), [kind], Limits(repeats=1, budget=0))


@pytest.mark.parametrize("kind", ["states", "near", "linear", "windows", "states-core"])
def test_what_training_runs_on_is_held_to_the_definition_too(kind, monkeypatch):
    monkeypatch.setattr(plain, "run", scaled(plain.run))
    assert check(kind, shape()) < 1e-5
    with pytest.raises(SdHyenaError, match="is off by"):
        check(kind, shape(), backward=True)


@pytest.mark.parametrize(
    "missing", [lambda call: {"near": None}, lambda call: {"weights": torch.ones_like(call.weights)}], ids=["near", "T"]
)
def test_a_part_that_is_left_out_is_caught(missing, monkeypatch):
    """Near filters and block weights start at nothing: an untrained layer would not miss them."""
    monkeypatch.setattr(cpu, "run", lambda call, run=cpu.run: run(call._replace(**missing(call))))
    with pytest.raises(SdHyenaError, match="is off by"):
        check("states", shape())


def test_tiles_that_are_not_separate_are_caught(monkeypatch):
    monkeypatch.setattr(kinds.TiledAttention, "tile", 4)
    monkeypatch.setattr(kinds.TiledAttention, "forward", kinds.Attention.forward)
    with pytest.raises(SdHyenaError, match="is off by"):
        check("hypertile", shape())


def test_groups_that_are_not_averaged_evenly_are_caught(monkeypatch):
    right = kinds.MergedAttention._merging

    def wrong(self, x, size):
        merge, unmerge = right(self, x, size)
        return (lambda x: merge(x * torch.linspace(0.9, 1.1, x.shape[1])[:, None])), unmerge

    monkeypatch.setattr(kinds.MergedAttention, "_merging", wrong)
    with pytest.raises(SdHyenaError, match="is off by"):
        check("tomesd", shape())


def test_a_wrong_gradient_is_caught(monkeypatch):
    def wrong(call, run=plain.run):
        y = run(call)
        y.register_hook(lambda gradient: 1.01 * gradient)
        return y

    monkeypatch.setattr(plain, "run", wrong)
    check("states", shape())
    with pytest.raises(SdHyenaError, match="is off by"):
        check("states", shape(), backward=True)


def test_values_that_are_not_finite_are_caught(monkeypatch):
    monkeypatch.setattr(kinds, "softmax_attention", lambda q, k, v: v * float("nan"))
    with pytest.raises(SdHyenaError, match="is off by inf"):
        check("naive", shape())


def test_reference_attention_is_softmax_attention():
    layer = kinds.Attention(shape(), kinds.softmax_attention).double()
    x = torch.randn(2, 120, 16, dtype=torch.float64)
    everything = references.attention(x, layer.projections, 2, torch.arange(120))
    assert torch.allclose(everything, layer(x, (10, 12)))


def test_hypertile_cuts_like_its_name_says():
    layer = kinds.TiledAttention(shape(), F.scaled_dot_product_attention)
    assert layer._index((64, 96), CPU).shape == (6, 32 * 32)
    assert layer._index((37, 40), CPU).shape == (1, 37 * 40)
    assert sorted(layer._index((64, 96), CPU).flatten().tolist()) == list(range(64 * 96))
