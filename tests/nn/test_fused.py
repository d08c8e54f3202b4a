"""The layer by fused kernels does the same sums as the definition."""

import logging

import pytest
import torch
from conftest import DEVICE, TensorBytes, assert_close
from test_chunked import definition, trained
from torch import nn

from sd_hyena.nn import Hyena2D, fused
from sd_hyena.ops import dispatch, environment

pytest.importorskip("triton", reason="Triton is not installed")
RATIO = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _asked(monkeypatch):
    """On a CPU kernels are used only if one is asked for."""
    monkeypatch.setenv(environment.KERNEL, "flash")
    dispatch.log.cache_clear()
    dispatch._choose.cache_clear()


def run(operator, x, grid, projections=None):
    with torch.no_grad():
        return operator(x, grid, projections)


@pytest.mark.parametrize("branch", ["none", "mean", "linear"])
@pytest.mark.parametrize("kernel", ["flash", "columns", "fft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_definition(branch, kernel, dtype, monkeypatch):
    monkeypatch.setenv(environment.KERNEL, kernel)
    torch.manual_seed(0)
    operator = trained(global_branch=branch).to(DEVICE, dtype)
    x = torch.randn(2, 35, 16).to(DEVICE, dtype)
    if kernel == "fft" and DEVICE == "cpu":  # asked for by name, it is the CPU's own path
        monkeypatch.setattr(fused, "suits", lambda *_: True)
    expected = definition(operator, x, (5, 7))
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for _ in ("made", "kept"):
        assert_close(f"{branch} {kernel} {dtype}", expected, run(operator, x, (5, 7)), RATIO[dtype])


@pytest.mark.parametrize(
    ("grid", "choices", "low"),
    [
        ((1, 1), {"num_heads": 2}, ""),
        ((13, 4), {"short_filter_order": 5, "in_bias": False}, "1"),
        ((5, 7), {"inner_dim": 24}, ""),
        ((16, 16), {"scaling": "extend"}, "1"),
        ((13, 4), {"global_branch": "mean", "scaling": "extend"}, ""),
    ],
)
def test_every_choice_and_any_grid(grid, choices, low, monkeypatch):
    monkeypatch.setenv(environment.LOW_MEMORY, low)
    torch.manual_seed(0)
    operator = trained(**choices).to(DEVICE)
    x = torch.randn(3, grid[0] * grid[1], 16).to(DEVICE)
    assert fused.suits(operator, x, [operator.in_proj, operator.out_proj]) is False  # a gradient could be asked for
    assert_close(f"{grid} {choices}", definition(operator, x, grid), run(operator, x, grid), 1e-5)


@pytest.mark.parametrize("branch", ["mean", "linear"])
@pytest.mark.parametrize("form", ["full", "core"])
def test_groups_of_channels_are_put_together(branch, form, monkeypatch):
    monkeypatch.setenv(environment.LOW_MEMORY, "1")
    torch.manual_seed(0)
    operator = trained(inner_dim=48, attention_heads=3, form=form, global_branch=branch).to(DEVICE)
    assert len(operator.channel_groups(fused.channels_at_once(48, 2, 35), least=16)) == 3
    layers = None
    if form == "core":
        layers = [nn.Linear(16, 48, bias=i == 1).to(DEVICE) for i in range(3)] + [nn.Linear(48, 16).to(DEVICE)]
    x = torch.randn(2, 35, 16).to(DEVICE)
    assert_close("groups", definition(operator, x, (5, 7), layers), run(operator, x, (5, 7), layers), 1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_core_runs_on_the_teachers_projections(batch):
    torch.manual_seed(0)
    operator = trained(form="core").to(DEVICE)
    layers = [nn.Linear(16, 16, bias=i == 3).to(DEVICE) for i in range(4)]
    x = torch.randn(batch, 35, 16).to(DEVICE)
    with torch.no_grad():
        assert fused.suits(operator, x, layers)
    assert_close("core", definition(operator, x, (5, 7), layers), run(operator, x, (5, 7), layers), 1e-5)


def test_low_memory_keeps_fewer_spectra_and_works_on_fewer_channels(monkeypatch):
    operator, x = Hyena2D(320), torch.empty(1, 512 * 512, 320, dtype=torch.float16, device="meta")
    backend = dispatch.BACKENDS[1]
    for low, channels in (("", 320), ("1", 40)):
        monkeypatch.setenv(environment.LOW_MEMORY, low)
        assert fused.channels_at_once(320, 1, 64 * 64) == channels
        at_once = fused.channels_at_once(320, 1, 512 * 512)
        plan = fused.memory_plan(operator, (512, 512), x, at_once, backend)
        assert at_once == 21
        assert plan.channels < 160 if low else plan.channels == 320


class Launched:
    """Stands in for a kernel: takes any launch and computes nothing."""

    def __getitem__(self, grid):
        return lambda *args, **how: None


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels' stand-ins compute nothing")
@pytest.mark.parametrize(("branch", "low", "most"), [("mean", "", 4.4), ("linear", "", 4.9), ("linear", "1", 3.6)])
def test_memory_of_eight_images_stays_below_attentions(branch, low, most, monkeypatch):
    """In units of B L D elements, input and kept spectra included: attention takes five.

    Tensors are counted, not what a library's matrix product takes for itself, which differs between processors.
    """
    monkeypatch.setenv(environment.LOW_MEMORY, low)
    kernels = dispatch.kernels()
    for module, name in (
        (kernels.short_gate, "_short_gate"), (kernels.flash, "_flash"),
        (kernels.features, "_sums"), (kernels.features, "_join"), (kernels.features, "_apply"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Launched())
    operator = Hyena2D(320, extent=(16, 16), attention_heads=8, global_branch=branch).eval().half()
    x = torch.randn(8, 32 * 32, 320).half()
    run(operator, x, (32, 32))
    with TensorBytes() as held:
        run(operator, x, (32, 32))
    units = (x.nbytes + held.peak + operator.spectra.nbytes()) / x.nbytes
    assert units <= most, units


class Hooked(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda o: None, ""),
        (lambda o: setattr(o, "out_proj", Hooked(16, 16)), "its projections do more than their weights say"),
        (lambda o: o.short_filter.register_forward_hook(lambda *_: None), "its short filter does more"),
        (lambda o: o.out_proj.double(), "its projections are of another type"),
    ],
)
def test_what_the_kernels_cannot_take_is_said_once(change, reason, caplog):
    operator, x = trained().to(DEVICE), torch.randn(1, 35, 16, dtype=torch.float16, device=DEVICE)
    operator = operator.to(x.dtype)
    change(operator)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        for _ in range(2):
            layers = [operator.in_proj, operator.out_proj]
            assert fused.suits(operator, x, layers) is (not reason)
    lines = [r.message for r in caplog.records if "without fused kernels" in r.message]
    assert len(lines) == bool(reason)
    assert not reason or reason in lines[0]


@pytest.mark.parametrize("choices", [{"order": 3}, {"feature_map": "elu"}])
def test_other_operators_run_as_before(choices):
    torch.manual_seed(0)
    operator, x = trained(**choices).to(DEVICE), torch.randn(2, 35, 16).to(DEVICE)
    assert_close("as before", definition(operator, x, (5, 7)), run(operator, x, (5, 7)), 3e-5)
