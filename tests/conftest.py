"""Shared fixtures. Tests run offline, on two threads, and keep drawn latents in a temporary cache."""

from __future__ import annotations

import gc
import importlib
import os
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels are tested in Triton's interpreter, or compiled on the device that SD_HYENA_TEST_DEVICE names.
DEVICE = os.environ.get("SD_HYENA_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402 - torch and triton read the environment when imported
import torch  # noqa: E402
from demo.thin_models import _folders, _thin, no_network, saved_folder, thin_model  # noqa: E402, F401 - fixtures
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from ui.started import address, hyena_dir, served, start  # noqa: E402, F401 - fixtures

torch.backends.cudnn.allow_tf32 = False  # float32 means float32


def pytest_collection_modifyitems(items):
    if not os.environ.get("SD_HYENA_NIGHTLY"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="SD_HYENA_NIGHTLY=1 runs it"))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    os.environ["SD_HYENA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _imported():
    """What stays anyway is not looked through by each of the many garbage collections."""
    for name in (
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "matplotlib.pyplot",
        "transformers.models.clip.modeling_clip",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _few_held_out(request):
    """Where commands train, layers are measured on a few held-out inputs: figures need not be exact."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name == "cli":
            patch.setattr("sd_hyena.distill.trainer.VALIDATION_SAMPLES", 8)
        yield


@pytest.fixture(scope="session")
def demo_pipe():
    """The bundled model. Tests that patch it must leave it as they found it."""
    from sd_hyena.models import DEMO, load_pipeline, locate

    return load_pipeline(locate(DEMO))


@pytest.fixture
def pipe(demo_pipe):
    """The bundled model, unpatched again afterwards."""
    from sd_hyena import patch

    patch.detach(demo_pipe.unet)
    yield demo_pipe
    patch.detach(demo_pipe.unet)


def make_unet(**changes):
    """A tiny UNet with SD1.x's block types and all 16 targets."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 16,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16, 16),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**(config | changes)).eval().requires_grad_(False)


@pytest.fixture
def unet():
    return make_unet()


def run_unet(unet, h=16, w=16, batch=2):
    """One forward pass on fixed inputs."""
    generator = torch.Generator().manual_seed(h * 1000 + w)
    x = torch.randn(batch, unet.config.in_channels, h, w, generator=generator)
    states = torch.randn(batch, 7, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([500] * batch), states).sample


def assert_close(name, reference, got, ratio):
    """Relative RMS difference at most ``ratio``."""
    error = (reference - got).double().square().mean().sqrt()
    scale = reference.double().square().mean().sqrt()
    assert torch.isfinite(got).all(), f"{name} has values that are not finite"
    assert error <= ratio * scale, f"{name}: relative RMS {error / scale:.2e} > {ratio:.0e}"


def trained(config, seed=0):
    """A float32 operator none of whose weights says nothing."""
    from sd_hyena.nn import build

    torch.manual_seed(seed)
    operator = build(config)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    return operator


def assert_gradients_close(operator, x, size, given, ratio):
    """Gradients of input and weights are those of the definition."""
    weight = torch.randn_like(x)
    x = x.requires_grad_()
    named = dict(operator.named_parameters())
    y = operator(x, size, given)
    got = torch.autograd.grad((y * weight).sum(), [x, *named.values()])
    double = operator.double()
    z = x.detach().double().requires_grad_()
    doubled = [named[name] for name in named]
    tokens = torch.arange(x.shape[1], device=x.device)
    given = None if given is None else given.double()
    exact = double.reference(z, size, tokens, given)
    assert_close("training", exact, y, ratio)
    wanted = torch.autograd.grad((exact * weight).sum(), [z, *doubled])
    scale = max(g.abs().max().item() for g in wanted)
    for name, a, b in zip(["x", *named], wanted, got, strict=True):
        if a.abs().max() > 1e-6 * scale:  # what hardly matters may be off by rounding
            assert_close(name, a, b, 20 * ratio)


class TensorBytes(TorchDispatchMode):
    """``peak``: most bytes at once of tensors that were made within the block, whoever computes what is in them."""

    held = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:  # neither a view nor written in place
                inputs.add(storage._cdata)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, nbytes):
        self.held += nbytes
        self.peak = max(self.peak, self.held)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps one state a process; each command here stands for a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
