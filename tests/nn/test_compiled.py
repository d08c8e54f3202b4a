"""torch.compile keeps whole graphs, and what it makes computes the same."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE, assert_close, make_unet, run_unet
from test_chunked import trained

from sd_hyena import patch
from sd_hyena.nn import OperatorConfig, compiled
from sd_hyena.targets import find_targets


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize(("branch", "order"), [("none", 2), ("mean", 2), ("linear", 2), ("mean", 3)])
def test_outputs_and_gradients(branch, order):
    torch.manual_seed(0)
    operator = trained(global_branch=branch, order=order).train().to(DEVICE)
    x, weight = torch.randn(2, 35, 16, device=DEVICE, requires_grad=True), torch.randn(2, 35, 16, device=DEVICE)
    leaves = [x, *operator.parameters()]
    fast = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for run in (operator, fast):
        y = run(x, (5, 7))
        gradients = torch.autograd.grad((y * weight).sum(), leaves)
        if run is operator:
            expected, wanted = y, gradients
    assert_close("y", expected, y, 1e-5)
    for (name, _), a, b in zip([("x", None), *operator.named_parameters()], wanted, gradients, strict=True):
        assert_close(name, a, b, 1e-4)
    with torch.no_grad():
        assert_close("inference", expected, fast(x, (5, 7)), 1e-5)


def test_inductor_makes_code_for_it():
    torch.manual_seed(0)
    operator, x = trained().to(DEVICE), torch.randn(2, 35, 16, device=DEVICE)
    fast = torch.compile(operator, fullgraph=True)
    with torch.no_grad():
        assert_close("inductor", operator(x, (5, 7)), fast(x, (5, 7)), 1e-5)


def test_a_patched_unet_is_one_graph():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    unet = make_unet()
    found = find_targets(unet)
    torch.manual_seed(1)
    for name, form in (("IN01", "full"), ("OUT11", "core"), ("M00", "full")):
        patch.attach(unet, {name: OperatorConfig(found[name].dim, 4, 4, attention_heads=2, form=form).build()})
    expected = run_unet(unet)

    class Compiled:
        config = unet.config
        __call__ = staticmethod(torch.compile(unet, fullgraph=True, backend="aot_eager"))

    assert_close("unet", expected, run_unet(Compiled()), 1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_a_layer_of_its_own(copied):
    operator = trained()
    twin = copied(operator)
    assert compiled._layers[operator.key] is operator
    assert compiled._layers[twin.key] is twin
