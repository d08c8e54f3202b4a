"""The paths between the projections: Triton's kernels (interpreted, or on SD_HYENA_TEST_DEVICE) and the CPU's are held
to the definition, and what fails is left for the plain path with one warning."""

import logging

import pytest
import torch
from conftest import DEVICE, TensorBytes, assert_close, trained
from out_of_memory import ERRORS, fail

from sd_hyena.config import OperatorConfig
from sd_hyena.errors import UsageError
from sd_hyena.ops import mix as mixing
from sd_hyena.ops.blocks import block_of, blocks_along, cut, join
from sd_hyena.ops.mix import cpu, gpu, plain, trust
from sd_hyena.ops.naive import linear_attention

SHAPES = [
    ((1, 1), 1, 5, None),
    ((13, 4), 2, 16, (4, 4)),
    ((9, 23), 3, 40, (5, 7)),
    ((16, 16), 1, 80, (8, 8)),
    ((33, 40), 2, 16, None),
]
if DEVICE != "cpu":
    SHAPES += [((64, 64), 8, 40, (8, 8)), ((127, 96), 8, 40, (16, 16)), ((16, 16), 8, 160, (8, 8))]


def make_call(size, heads, width, block, feature_map="cubed_relu", near=True, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, size[0] * size[1], heads, width, device=DEVICE, dtype=dtype) for _ in range(3))
    weights, conv = None, None
    if block:
        count = blocks_along(size, block)[0] * blocks_along(size, block)[1]
        weights = torch.rand(heads, count, count, device=DEVICE) + 0.5
    if near:
        channels = heads * width
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False).to(DEVICE, dtype)
        conv.requires_grad_(grad)
    return mixing.Call(q.requires_grad_(grad), k, v, size, feature_map, block, weights, conv, 1 if near else 0)


def exact(call):
    """The definition in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (call.q, call.k, call.v))
    weights = None
    if call.weights is not None:
        own = block_of(call.size, call.block).to(DEVICE)
        weights = call.weights.double()[:, own[:, None], own]
    y = linear_attention(q, k, v, call.feature_map, torch.arange(q.shape[2], device=DEVICE), weights)
    if call.near is not None:
        taps = call.near.weight.double()
        y = y + torch.nn.functional.conv2d(
            mixing.planes(call.v.double(), call.size), taps, padding=1, groups=len(taps)
        ).flatten(2).transpose(1, 2)
    return y


@pytest.fixture
def _triton(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("SD_HYENA_KERNEL", "triton")
    monkeypatch.setattr(trust, "_verdicts", {})


# Interpreted, a kernel is slow: all maps at two grids, with blocks and without; the others by night.
EVERY = [
    pytest.param(shape, name, id=f"{shape}-{name}", marks=() if n in (2, 4) or DEVICE != "cpu" else pytest.mark.nightly)
    for n, shape in enumerate(SHAPES)
    for name in ("cubed_relu", "squared_relu", "exp", "elu")
]


@pytest.mark.parametrize(("shape", "feature_map"), EVERY)
@pytest.mark.usefixtures("_triton")
def test_kernels_equal_the_definition(shape, feature_map, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))  # what is left out shows
    for near in (True, False):
        call = make_call(*shape, feature_map, near)
        assert gpu.refuses(call) == ""
        assert_close("float32", exact(call), gpu.run(call), 2e-6)
    half = make_call(*shape, feature_map, dtype=torch.float16)
    assert_close("float16", exact(half), gpu.run(half), 5e-3)


@pytest.mark.parametrize("path", [cpu, plain])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paths_equal_the_definition(path, shape, monkeypatch):
    if path is cpu and DEVICE != "cpu":
        pytest.skip("the CPU's path is for the CPU")
    monkeypatch.setattr(cpu, "BAND", 300)  # several bands, the last one shorter
    monkeypatch.setattr(plain, "GROUP", 1)
    for near in (True, False):
        call = make_call(*shape, near=near)
        assert_close(path.NAME, exact(call), path.run(call), 2e-6)


@pytest.mark.usefixtures("_triton")
def test_what_asks_for_the_kernels_gets_them(monkeypatch):
    runs = []
    monkeypatch.setattr(gpu, "run", lambda call, run=gpu.run: runs.append(call.size) or run(call))
    call = make_call((13, 4), 2, 16, (4, 4))
    assert_close("triton", exact(call), mixing.mix(call), 2e-6)
    mixing.mix(call)
    assert runs == [(11, 4), (13, 4), (13, 4)]  # a trial once, with a block cut by the edge, then every call


def wrong(call):
    return 1.1 * plain.run(call)


def raises(call):
    raise RuntimeError("no PTX for this device")


def no_compiler(call):
    raise FileNotFoundError("gcc")


@pytest.mark.parametrize(
    ("broken", "why"), [(wrong, "are off by"), (raises, "no PTX for this device"), (no_compiler, "FileNotFoundError")]
)
@pytest.mark.usefixtures("_triton")
def test_a_broken_kernel_is_warned_of_once_and_left(broken, why, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "run", broken)
    call = make_call((13, 4), 2, 16, (4, 4))
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        for _ in range(3):
            assert_close("plain", exact(call), mixing.mix(call), 2e-6)
    assert [why in r.message for r in caplog.records] == [True]


@pytest.mark.usefixtures("_triton")
def test_a_kernel_that_breaks_later_is_left_too(monkeypatch, caplog):
    call = make_call((13, 4), 2, 16, (4, 4))
    mixing.mix(call)
    monkeypatch.setattr(gpu, "run", raises)
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        for _ in range(2):
            assert_close("plain", exact(call), mixing.mix(call), 2e-6)
    assert len(caplog.records) == 1


@pytest.mark.reliability(14)
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("kind", ERRORS)
def test_running_out_of_memory_is_not_hidden(monkeypatch, caplog, kind):
    call = make_call((13, 4), 2, 16, None)
    with monkeypatch.context() as patched:
        fail(patched, gpu, "run", kind=kind)
        with pytest.raises(type(ERRORS[kind]())):
            mixing.mix(call)
    assert_close("plain", exact(call), mixing.mix(call), 2e-6)
    assert not caplog.messages  # and is no reason to leave the kernels


def test_paths_are_chosen_by_what_they_refuse(monkeypatch, caplog):
    monkeypatch.delenv("SD_HYENA_KERNEL", raising=False)
    if DEVICE == "cpu":
        assert mixing.choose(make_call((4, 4), 1, 8, None)) is cpu
        assert mixing.choose(make_call((4, 4), 1, 8, None, dtype=torch.float16)) is plain
    assert mixing.choose(make_call((4, 4), 1, 8, None, grad=True)) is plain
    with torch.no_grad():
        assert mixing.choose(make_call((4, 4), 1, 8, None, grad=True)) is not plain
    mixing.log.cache_clear()
    monkeypatch.setenv("SD_HYENA_KERNEL", "cpu")
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        assert mixing.choose(make_call((4, 4), 1, 8, None, grad=True)) is plain
    assert "SD_HYENA_KERNEL=cpu is passed over: a gradient is wanted" in caplog.text or DEVICE != "cpu"
    monkeypatch.setenv("SD_HYENA_KERNEL", "fast")
    with pytest.raises(UsageError, match="must be one of triton, cpu, plain"):
        mixing.choose(make_call((4, 4), 1, 8, None))


def test_cutting_into_blocks_and_back():
    x = torch.randn(2, 9 * 23, 3, 4)
    blocks = cut(x, (9, 23), (5, 7))
    assert blocks.shape == (2, 3, 2 * 4, 35, 4)
    assert torch.equal(join(blocks, (9, 23), (5, 7)), x)
    number = cut(block_of((9, 23), (5, 7))[None, :, None, None] + 1, (9, 23), (5, 7))[0, 0, ..., 0]
    assert all(set(row.tolist()) <= {0, n + 1} for n, row in enumerate(number))


@pytest.mark.parametrize("grid", [(64, 64), (96, 64)])
def test_a_layer_holds_hardly_more_than_attention_does(grid):
    """Attention holds q, k, v, their result and the output: five times the input."""
    operator = trained(OperatorConfig(320, *grid, attention_heads=8)).to(DEVICE)
    x = torch.randn(2, grid[0] * grid[1], 320, device=DEVICE)
    with torch.no_grad(), TensorBytes() as held:
        operator(x, grid)
    assert held.peak < 5.2 * x.nbytes
