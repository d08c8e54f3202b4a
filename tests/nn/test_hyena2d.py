"""``Hyena2D``: any grid, no parameter that grows, the fast path held to its definition."""

import copy
import itertools

import pytest
import torch
from conftest import assert_close

from sd_hyena.nn import Hyena2D, OperatorConfig

GRIDS = [(1, 1), (5, 7), (8, 8), (13, 4), (11, 17)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("branch", "scaling"), itertools.product(["none", "mean", "linear"], ["extend", "stretch"]))
@pytest.mark.parametrize(
    "choices",
    [{}, {"order": 3}, {"num_heads": 2}, {"short_filter_order": 1}, {"feature_map": "elu"}, {"num_features": 3}],
)
def test_fast_path_equals_reference(grid, branch, scaling, choices):
    torch.manual_seed(0)
    operator = Hyena2D(8, extent=(6, 9), attention_heads=2, global_branch=branch, scaling=scaling, **choices)
    u = torch.randn(2, 8 * (operator.order + 1), *grid)
    results = []
    for reference, dtype in ((True, torch.float64), (False, torch.float32)):
        model = copy.deepcopy(operator).to(dtype)
        x = u.to(dtype).requires_grad_()
        y = model.mix(x, reference=reference)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "u": x.grad} | grads)
    expected, got = results
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        scale = value.double().square().mean().sqrt()
        if scale > 1e-6:  # gradients that vanish by symmetry (a single cell) have no relative error
            assert_close(f"{name} {grid} {branch}", value, got[name], 1e-4 if "filter" in name else 2e-5)


def test_no_parameter_depends_on_the_resolution():
    small, large = Hyena2D(16, extent=(8, 8)), Hyena2D(16, extent=(128, 96))
    assert [p.shape for p in small.parameters()] == [p.shape for p in large.parameters()]
    sizes = {4, 8, 96, 128, 64, 128 * 96}
    operator = Hyena2D(10, extent=(64, 64), attention_heads=2, filter_order=12)
    assert not any(side in sizes for p in operator.parameters() for side in p.shape)


def test_it_is_not_causal():
    torch.manual_seed(0)
    operator = Hyena2D(8, extent=(6, 6), global_branch="none", attention_heads=2)
    x = torch.randn(1, 36, 8)
    changed = x.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        assert (operator(x, (6, 6)) - operator(changed, (6, 6)))[:, 0].abs().max() > 1e-7


def test_extend_keeps_the_kernel_and_stretch_keeps_its_mass():
    torch.manual_seed(0)
    operator = Hyena2D(8, extent=(32, 32), attention_heads=2, scaling="extend")
    with torch.no_grad():
        trained = operator.filter((32, 32))
        assert torch.equal(operator.filter((50, 40)), trained)
        operator.filter.scaling = "stretch"
        stretched = operator.filter((128, 128))
    assert stretched.shape == (8, 255, 255)
    assert_close("mass", trained.sum((1, 2)), stretched.sum((1, 2)), 0.15)
    assert_close("centre", trained[:, 31, 31], stretched[:, 127, 127] * 16, 1e-5)


def test_cached_spectra_follow_the_weights():
    torch.manual_seed(0)
    operator = Hyena2D(8, extent=(6, 6), attention_heads=2).eval()
    x = torch.randn(1, 36, 8)

    def run():
        with torch.no_grad():
            return operator(x, (6, 6))

    first = run()
    assert torch.equal(first, run())
    with torch.no_grad():
        operator.filter.head.weight.mul_(3)
    changed = run()
    assert (changed - first).abs().max() > 1e-6
    fresh = copy.deepcopy(operator)
    with torch.no_grad():
        assert torch.equal(fresh(x, (6, 6)), changed)
    operator.load_state_dict({k: v / 3 if k == "filter.head.weight" else v for k, v in operator.state_dict().items()})
    assert_close("restored", first, run(), 1e-5)
    operator.filter.scaling = "extend"
    run()
    assert not any("spectr" in key for key in operator.state_dict())


def test_training_does_not_use_a_stale_spectrum():
    operator = Hyena2D(8, extent=(6, 6), attention_heads=2)
    x = torch.randn(1, 36, 8)
    with torch.no_grad():
        operator(x, (6, 6))
    operator(x, (6, 6)).sum().backward()
    assert operator.filter.head.weight.grad.abs().sum() > 0


def test_core_uses_the_given_projections():
    torch.manual_seed(0)
    operator = Hyena2D(8, extent=(4, 4), form="core", attention_heads=2)
    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    x = torch.randn(2, 16, 8)
    assert operator(x, (4, 4), layers).shape == x.shape
    with pytest.raises(ValueError, match="teacher's projections"):
        operator(x, (4, 4))
    with pytest.raises(ValueError, match="its own projections"):
        Hyena2D(8, attention_heads=2)(x, (4, 4), layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_close_to_float32(dtype):
    torch.manual_seed(0)
    operator = Hyena2D(16, extent=(8, 8), attention_heads=2).eval()
    x = torch.randn(1, 64, 16)
    with torch.no_grad():
        expected = operator(x, (8, 8))
        got = operator.to(dtype)(x.to(dtype), (8, 8))
    assert got.dtype == dtype
    assert_close("half", expected, got.float(), 3e-2)


def test_wrong_token_count():
    with pytest.raises(ValueError, match="20 tokens are not a 4 x 4 grid"):
        Hyena2D(8, attention_heads=2)(torch.randn(1, 20, 8), (4, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "half"},
        {"global_branch": "some"},
        {"feature_map": "relu"},
        {"num_features": 0},
        {"order": 1},
        {"order": 3, "form": "core"},
        {"num_heads": 3},
        {"attention_heads": 3},
        {"short_filter_order": 4},
        {"scaling": "shrink"},
    ],
)
def test_settings_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=r"must be|cannot be split"):
        Hyena2D(8, **({"attention_heads": 2} | wrong))


def test_config_round_trip():
    config = OperatorConfig(8, 4, 6, attention_heads=2, num_heads=2, order=3, global_branch="mean")
    assert OperatorConfig.from_dict(config.to_dict()) == config
    assert config.build().config == config
    for key, value in {"dim": 0, "order": 10**6, "height": -3, "width": "9", "operator": "hyena3d"}.items():
        with pytest.raises(ValueError, match=key):
            OperatorConfig.from_dict(config.to_dict() | {key: value})
    with pytest.raises(ValueError, match="missing"):
        OperatorConfig.from_dict({"dim": 8})
