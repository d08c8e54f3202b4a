"""CPU inference by chunks does the same sums as the definition, however it is cut."""

import copy
import itertools

import pytest
import torch
from conftest import assert_close
from torch import nn

from sd_hyena.nn import Hyena2D, chunked, hyena2d, spectrum_cache
from sd_hyena.nn.attention import projections_of
from sd_hyena.nn.hyena2d import MemoryPlan

GRIDS = [(1, 1), (5, 7), (13, 4), (16, 16), (11, 17)]


def trained(**choices):
    """An operator whose every term matters."""
    operator = Hyena2D(16, **{"extent": (6, 9), "attention_heads": 2} | choices).eval()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return operator


def definition(operator, x, grid, projections=None):
    """The operator in float64 by the O(L^2) sums."""
    model = copy.deepcopy(operator).double()
    *inputs, out = [copy.deepcopy(p).double() for p in projections or (model.in_proj, model.out_proj)]
    with torch.no_grad():
        u = torch.cat([project(x.double()) for project in inputs], -1)
        y = model.mix(u.transpose(1, 2).unflatten(2, grid), reference=True)
        return out(y.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("branch", "order"), itertools.product(["none", "mean", "linear"], [2, 3]))
@pytest.mark.parametrize("choices", [{}, {"num_heads": 2}, {"short_filter_order": 5}, {"inner_dim": 24, "dim": 16}])
@pytest.mark.parametrize("limits", [{}, {"CHUNK": 1, "TILE": 20, "BLOCK": 7}])
def test_chunks_add_up_to_the_definition(grid, branch, order, choices, limits, monkeypatch):
    torch.manual_seed(0)
    for name, value in limits.items():
        monkeypatch.setattr(chunked, name, value)
    operator = trained(**{"order": order, "global_branch": branch, **{k: v for k, v in choices.items() if k != "dim"}})
    monkeypatch.setattr(
        operator,
        "channel_groups",
        lambda *_, **__: [slice(0, 12), slice(12, 24)] if operator.inner_dim == 24 else [slice(0, 8), slice(8, 16)],
    )
    x = torch.randn(3, grid[0] * grid[1], 16)
    expected = definition(operator, x, grid)
    with torch.no_grad():
        for attempt in ("made", "kept"):
            assert_close(f"{grid} {branch} {attempt}", expected, operator(x, grid), 3e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_core_projections_are_used_as_they_are(wrapped):
    """A plain linear layer is applied in pieces; one that does more is called."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    operator = trained(form="core")
    layers = [(Doubled if wrapped and i in (1, 3) else nn.Linear)(16, 16) for i in range(4)]
    x = torch.randn(2, 35, 16)
    with torch.no_grad():
        assert_close("core", definition(operator, x, (5, 7), layers), operator(x, (5, 7), layers), 3e-5)


def test_projections_need_not_agree_on_having_a_bias():
    torch.manual_seed(0)
    operator = trained(form="core")
    layers = [nn.Linear(16, 16, bias=i in (1, 3)) for i in range(4)]
    x = torch.randn(2, 35, 16)
    with torch.no_grad():
        assert_close("core", definition(operator, x, (5, 7), layers), operator(x, (5, 7), layers), 3e-5)


def test_projections_of_a_core_layer_get_their_gradients():
    """LoRA on a frozen model: neither the input nor the operator wants a gradient, but a projection does."""
    torch.manual_seed(0)
    operator = trained(form="core").requires_grad_(False)
    layers = [nn.Linear(16, 16).requires_grad_(i == 2) for i in range(4)]
    operator(torch.randn(1, 35, 16), (5, 7), layers).sum().backward()
    assert layers[2].weight.grad.abs().sum() > 0


def test_a_short_filter_that_is_more_than_its_weights_is_called():
    torch.manual_seed(0)
    operator = trained(global_branch="mean")
    x = torch.randn(2, 35, 16)
    expected = definition(operator, x, (5, 7))
    calls = []
    operator.short_filter.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert_close("hooked", expected, operator(x, (5, 7)), 3e-5)
    assert calls == [1]


def test_a_unets_output_projection_is_its_linear_layer():
    attention = nn.Module()
    attention.to_q = attention.to_k = attention.to_v = nn.Linear(4, 4)
    attention.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])
    assert projections_of(attention)[3] is attention.to_out[0]
    attention.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.5)]).train()
    assert isinstance(projections_of(attention)[3], nn.Sequential)


def test_hooks_on_a_projection_are_heard():
    operator = trained()
    x, calls = torch.randn(1, 12, 16), []
    operator.in_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        operator(x, (3, 4))
    assert calls


def test_training_in_groups_gives_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    operator, x = trained(global_branch="mean"), torch.randn(2, 35, 16)
    results = []
    for groups in ([slice(0, 16)], [slice(0, 8), slice(8, 16)]):
        model = copy.deepcopy(operator)
        monkeypatch.setattr(model, "channel_groups", lambda *_, groups=groups, **__: groups)
        leaf = x.clone().requires_grad_()
        y = model(leaf, (5, 7))
        y.square().sum().backward()
        results.append({"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in model.named_parameters()})
    for name, expected in results[0].items():
        assert_close(name, expected, results[1][name], 1e-4)


def test_what_is_kept_depends_on_what_attention_would_take():
    """All spectra for two images and more; for one, as many as leave the layer below its bound."""
    operator = Hyena2D(320, global_branch="mean")
    image = 4096 * 320 * 4
    assert operator.plan_memory((64, 64), 2 * image, 40, 2**22) == MemoryPlan(320, False)
    alone = operator.plan_memory((64, 64), image, 40, 2**22)
    assert alone.keep_hidden
    assert 0 < alone.channels < 320
    assert operator.plan_memory((32, 32), image // 4, 320, 2**22) == MemoryPlan(320, False)


def counted(operator, monkeypatch):
    """How many kernel taps are made, as they are made."""
    made, right = [], operator.kernels

    def kernels(*args):
        taps = right(*args)
        made.append(taps.numel())
        return taps

    monkeypatch.setattr(operator, "kernels", kernels)
    return made


def test_kept_spectra_are_not_made_again_whatever_the_batch(monkeypatch):
    """Groups depend on the batch; what is kept must serve every batch, and grow with it."""
    torch.manual_seed(0)
    monkeypatch.setattr(hyena2d, "SMALL_CELLS", 0)
    monkeypatch.setattr(chunked, "CHUNK", 2**30)
    operator = trained(global_branch="mean")
    groups = {1: [slice(0, 6), slice(6, 12), slice(12, 16)], 4: [slice(0, 8), slice(8, 16)]}
    made, whole = counted(operator, monkeypatch), 16 * 31 * 31
    for batch, channels, taps in ((1, 6, whole), (1, 6, 10 * 961), (4, 16, whole), (4, 16, 0), (1, 16, 0)):
        monkeypatch.setattr(operator, "channel_groups", lambda *_, batch=batch, **__: groups[batch])
        monkeypatch.setattr(operator, "plan_memory", lambda *_, channels=channels: MemoryPlan(channels, True))
        x = torch.randn(batch, 256, 16)
        made.clear()
        with torch.no_grad():
            got = operator(x, (16, 16))
        assert sum(made) == taps
        made.clear()
        assert_close(f"batch {batch}", definition(operator, x, (16, 16)), got, 3e-5)
    with torch.no_grad():
        operator(torch.randn(1, 63, 16), (7, 9))
    assert operator.spectra.nbytes() < 100_000  # the other grid's are gone
    operator.eval()
    assert operator.spectra.nbytes() == 0


def test_what_inference_mode_made_serves_outside_of_it(monkeypatch):
    operator = trained(global_branch="mean")
    monkeypatch.setattr(operator, "channel_groups", lambda *_, **__: [slice(0, 8), slice(8, 16)])
    x = torch.randn(2, 256, 16)
    for channels, mode in ((8, torch.inference_mode), (16, torch.no_grad), (16, torch.inference_mode)):
        monkeypatch.setattr(operator, "plan_memory", lambda *_, channels=channels: MemoryPlan(channels, False))
        with mode():
            got = operator(x, (16, 16))
        assert_close(mode.__name__, definition(operator, x, (16, 16)), got.clone(), 3e-5)


def test_hidden_is_computed_once_a_call(monkeypatch):
    operator = trained(global_branch="mean")
    monkeypatch.setattr(operator, "plan_memory", lambda *_: MemoryPlan(0, False))
    monkeypatch.setattr(operator, "channel_groups", lambda *_, **__: [slice(0, 8), slice(8, 16)])
    calls, right = [], operator.filter.hidden
    monkeypatch.setattr(operator.filter, "hidden", lambda grid: calls.append(grid) or right(grid))
    with torch.no_grad():
        operator(torch.randn(1, 256, 16), (16, 16))
    assert calls == [(16, 16)]


def test_all_layers_together_keep_no_more_than_the_limit(monkeypatch):
    operators = [trained(global_branch="mean") for _ in range(3)]
    one = 8 * 17 * 32 * 16
    others = sum(cache.nbytes() for cache in spectrum_cache._caches)
    monkeypatch.setattr(spectrum_cache, "LIMIT", others + 2 * one)
    x = torch.randn(2, 256, 16)
    with torch.no_grad():
        for operator in operators:
            operator(x, (16, 16))
            assert torch.equal(operator(x, (16, 16)), operator(x, (16, 16)))
    assert [operator.spectra.nbytes() for operator in operators] == [one, one, 0]


def test_bfloat16_runs_close_to_float32():
    torch.manual_seed(0)
    operator, x = trained(global_branch="mean"), torch.randn(1, 256, 16)
    expected = definition(operator, x, (16, 16))
    with torch.no_grad():
        got = operator.bfloat16()(x.bfloat16(), (16, 16))
    assert got.dtype == torch.bfloat16
    assert_close("bf16", expected, got.double(), 5e-2)


@pytest.mark.parametrize("order", [2, 3])
def test_other_devices_path_keeps_spectra_too(order, monkeypatch):
    """What runs without gradients where chunks do not suit, on a GPU or under autocast."""
    torch.manual_seed(0)
    monkeypatch.setattr(chunked, "suits", lambda *_: False)
    operator = trained(order=order)
    monkeypatch.setattr(operator, "channel_groups", lambda *_, **__: [slice(0, 8), slice(8, 16)])
    x = torch.randn(2, 35, 16)
    expected = definition(operator, x, (5, 7))
    with torch.no_grad():
        for _ in range(2):
            assert_close("groups", expected, operator(x, (5, 7)), 3e-5)
    assert operator.spectra.nbytes() > 0
