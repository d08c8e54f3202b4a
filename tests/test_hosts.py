"""Whatever a host does to the UNet, Hyena layers are right or say so, and the original comes back bit for bit."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import assert_close, make_unet, run_unet, trained

import sd_hyena
from sd_hyena import checkpoint, patch
from sd_hyena.config import OperatorConfig
from sd_hyena.errors import UsageError
from sd_hyena.grid import grid_mask
from sd_hyena.placement import compute_dtype
from sd_hyena.targets import find_targets

NAMES = ["IN01", "IN04", "M00", "OUT11"]
FLOAT8 = torch.float8_e4m3fn


def operators(unet, names=NAMES, **choices):
    found = find_targets(unet)
    made = {}
    for number, name in enumerate(names):
        target = found[name]
        config = OperatorConfig(target.dim, 4, 4, attention_heads=target.heads, **({"block": 2} | choices))
        made[name] = trained(config, number).eval()
    return made


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "four.safetensors"
    checkpoint.save(path, operators(make_unet()))
    return path


@pytest.fixture
def expected(file):
    """(attention's output, Hyena's output) with no host about."""
    unet = make_unet()
    before = run_unet(unet)
    sd_hyena.load_hyena(unet, file)
    return before, run_unet(unet)


@pytest.mark.compatibility("Hosts", "sequential offload, before or after loading", "works, bit for bit")
@pytest.mark.parametrize("form", ["full", "core"])
@pytest.mark.parametrize("offload_first", [True, False])
def test_sequential_offload(form, offload_first, tmp_path):
    from accelerate import cpu_offload

    plain, unet = make_unet(), make_unet()
    before = run_unet(plain)
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, operators(plain, form=form))
    sd_hyena.load_hyena(plain, path)
    hyena = run_unet(plain)
    if offload_first:
        cpu_offload(unet, torch.device("cpu"))
    sd_hyena.load_hyena(unet, path)
    if not offload_first:
        cpu_offload(unet, torch.device("cpu"))
    assert torch.equal(run_unet(unet), hyena)
    assert {p.device.type for p in unet.parameters()} == {"meta"}
    sd_hyena.set_hyena_enabled(unet, False)
    assert torch.equal(run_unet(unet), before)
    sd_hyena.set_hyena_enabled(unet, True)
    assert torch.equal(run_unet(unet), hyena)
    again = tmp_path / "b.safetensors"
    sd_hyena.save_hyena(unet, again)
    assert torch.equal(checkpoint.load(again).tensors["IN01"]["near.weight"],
                       checkpoint.load(path).tensors["IN01"]["near.weight"])  # fmt: skip
    sd_hyena.unload_hyena(unet)
    assert {p.device.type for p in unet.parameters()} == {"meta"}
    assert torch.equal(run_unet(unet), before)


def test_an_offload_that_ended_meanwhile(file, expected):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    unet = make_unet()
    sd_hyena.load_hyena(unet, file)
    cpu_offload(unet, torch.device("cpu"))
    sd_hyena.set_hyena_enabled(unet, False)
    remove_hook_from_submodules(unet)
    assert torch.equal(run_unet(unet), expected[0])
    sd_hyena.set_hyena_enabled(unet, True)
    assert torch.equal(run_unet(unet), expected[1])


@pytest.mark.compatibility(
    "Hosts", "layerwise casting to eight bits, before or after loading", "works; what comes back is cast"
)
@pytest.mark.parametrize("cast_first", [True, False])
def test_layerwise_casting_to_eight_bits(cast_first, file, expected):
    unet = make_unet()
    cast = {"storage_dtype": FLOAT8, "compute_dtype": torch.float32}
    alone = make_unet()
    alone.enable_layerwise_casting(**cast)
    if cast_first:
        unet.enable_layerwise_casting(**cast)
    sd_hyena.load_hyena(unet, file)
    if not cast_first:
        unet.enable_layerwise_casting(**cast)
    hyena = run_unet(unet)
    assert_close("cast", expected[1], hyena, 0.2)
    assert not torch.equal(hyena, run_unet(alone))
    attention = unet.get_submodule(find_targets(unet)["IN01"].path).operator
    assert compute_dtype(attention) == torch.float32
    sd_hyena.unload_hyena(unet)
    base = unet.get_submodule(find_targets(unet)["IN01"].path)
    assert {p.dtype for p in base.parameters()} == {FLOAT8}
    assert torch.equal(run_unet(alone), run_unet(unet))


@pytest.mark.compatibility("Hosts", "channels_last", "works")
def test_channels_last(file, expected):
    unet = make_unet()
    sd_hyena.load_hyena(unet, file)
    unet.to(memory_format=torch.channels_last)
    assert_close("channels last", expected[1], run_unet(unet), 1e-5)


def test_a_unet_without_weights_is_refused(file):
    with torch.device("meta"):
        unet = make_unet()
    with pytest.raises(UsageError, match="on the meta device"):
        sd_hyena.load_hyena(unet, file)
    assert not patch.attached(unet)
    assert not any(m._forward_pre_hooks for m in unet.modules())


@pytest.mark.compatibility("Hosts", "deepcopy and pickle of a patched UNet", "works")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_and_pickles_stand_alone(copied, file, expected, tmp_path):
    unet = make_unet()
    sd_hyena.load_hyena(unet, file)
    twin = copied(unet)
    sd_hyena.unload_hyena(unet)
    assert torch.equal(run_unet(unet), expected[0])
    assert torch.equal(run_unet(twin), expected[1])
    twin.save_pretrained(tmp_path / "twin")
    sd_hyena.unload_hyena(twin)
    assert torch.equal(run_unet(twin), expected[0])
    assert torch.equal(run_unet(type(twin).from_pretrained(tmp_path / "twin").eval()), expected[0])


def test_inference_mode(file, expected):
    unet = make_unet()
    with torch.inference_mode():
        sd_hyena.load_hyena(unet, file)
        assert_close("inference", expected[1], run_unet(unet), 1e-6)
    assert_close("outside", expected[1], run_unet(unet), 1e-6)
    sd_hyena.unload_hyena(unet)
    assert torch.equal(run_unet(unet), expected[0])


def test_two_threads_and_two_sizes_share_one_unet(file):
    unet = make_unet()
    sd_hyena.load_hyena(unet, file)
    sizes = [(16, 24), (24, 16), (9, 11), (8, 8)]
    alone = {size: run_unet(unet, *size) for size in sizes}
    wrong = []

    def draw(size):
        wrong.extend(size for _ in range(6) if not torch.equal(run_unet(unet, *size), alone[size]))

    threads = [threading.Thread(target=draw, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.compatibility("Hosts", "gradient checkpointing", "works")
def test_gradient_checkpointing_sees_the_same_grid(file):
    unet = make_unet()
    sd_hyena.load_hyena(unet, file)
    x, states = torch.randn(1, 4, 9, 11), torch.randn(1, 7, 8)
    weight = unet.conv_in.weight.requires_grad_()
    (plain,) = torch.autograd.grad(unet(x, 3, states).sample.square().sum(), weight)
    unet.enable_gradient_checkpointing()
    unet.train()
    (again,) = torch.autograd.grad(unet(x, 3, states).sample.square().sum(), weight)
    assert_close("gradient", plain, again, 1e-5)


def test_layers_of_one_transformer_need_not_all_be_replaced():
    unet = make_unet(transformer_layers_per_block=2)
    before = run_unet(unet)
    patch.attach(unet, operators(unet, ["IN01.1", "OUT11.0"]))
    hyena = run_unet(unet)
    assert not torch.equal(hyena, before)
    patch.detach(unet, ["IN01.1"])
    patch.detach(unet)
    assert torch.equal(run_unet(unet), before)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.compatibility("Hosts", "torch.compile before loading, or after", "works")
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_unet_takes_layers_and_gives_them_back(file, expected):
    unet = make_unet()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert_close("before", expected[0], run_unet(compiled), 1e-5)
    sd_hyena.load_hyena(compiled, file)
    assert_close("loaded", expected[1], run_unet(compiled), 1e-5)
    sd_hyena.unload_hyena(compiled)
    assert_close("unloaded", expected[0], run_unet(compiled), 1e-5)
    assert not patch.attached(unet)


@pytest.mark.nightly
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_patched_unet_is_one_graph():
    unet = make_unet()
    patch.attach(unet, operators(unet, ["IN01", "OUT11"]))
    patch.attach(unet, operators(unet, ["IN04"], form="core"))
    plain = run_unet(unet)
    unet.compile(fullgraph=True, backend="aot_eager")
    assert_close("unet", plain, run_unet(unet), 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("form", "sizes", "backend"),
    [
        ("full", ((5, 7), (16, 16)), "eager"),
        ("core", ((5, 7),), "eager"),
        pytest.param("full", ((5, 7), (16, 16), (9, 11)), "aot_eager", marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_layer_takes_any_size(form, sizes, backend):
    unet = make_unet()
    patch.attach(unet, operators(unet, form=form))
    layer = patch.attached(unet)["IN01"].attention
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for size in sizes:  # a second is compiled for all
        x, mask = torch.randn(2, size[0] * size[1], 8), grid_mask(torch.randn(2, 8, *size))
        with torch.no_grad():
            assert_close(f"{size}", layer(x, attention_mask=mask), compiled(x, attention_mask=mask), 1e-5)


@pytest.mark.compatibility("Hosts", "compile_repeated_blocks", "works in one graph")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_repeated_blocks_of_a_full_size_unet_compile(architecture, monkeypatch):
    """All blocks' code is shared, so nothing about a layer may be peculiar to it. As many layers as in the real model;
    fewer channels, of which the compiler asks nothing."""
    from diffusers import UNet2DConditionModel

    from sd_hyena.families import FAMILIES

    config = FAMILIES[architecture].config("unet")
    config |= {"block_out_channels": [n // 10 for n in config["block_out_channels"]], "norm_num_groups": 4}
    config |= {"attention_head_dim": 4, "cross_attention_dim": 16, "sample_size": 16}
    if config.get("addition_embed_type"):
        config |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 24}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    patch.attach(unet, operators(unet, list(find_targets(unet))))
    added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}
    x, states = torch.randn(1, 4, 32, 32), torch.randn(1, 7, 16)

    def run():
        with torch.no_grad():
            return unet(x, 3, states, added_cond_kwargs=added).sample

    plain = run()
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_close(architecture, plain, run(), 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_makes_code_for_a_layer():
    operator = operators(make_unet())["IN01"]
    x = torch.randn(2, 35, 8)
    with torch.no_grad():
        assert_close("inductor", operator(x, (5, 7)), torch.compile(operator, fullgraph=True)(x, (5, 7)), 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["states", "near", "linear", "windows", "long"])
def test_every_operator_is_one_graph_with_its_gradients(name):
    operator = operators(make_unet(), operator=name)["IN01"].train()
    x = torch.randn(2, 35, 8, requires_grad=True)
    results = []
    for run in (operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        y = run(x, (5, 7))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *operator.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_close(name, a, b, 1e-4)


@pytest.mark.compatibility("Hosts", "quantised projections", "work; operators compute in the UNet's type")
def test_projections_that_are_quantised():
    class Int8(torch.nn.Module):
        """As quantisation libraries have it: integers and a scale, no floating-point weight."""

        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.detach().float().abs().max() / 127
            weight = (linear.weight.detach().float() / scale).round().to(torch.int8)
            self.weight, self.scale = torch.nn.Parameter(weight, requires_grad=False), scale.item()

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) * self.scale).T

    unet = make_unet().to(torch.bfloat16)
    for target in find_targets(unet).values():
        attention = unet.get_submodule(target.path)
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, Int8(getattr(attention, name)))
        attention.to_out[0] = torch.nn.Identity()
    patch.attach(unet, operators(unet))
    assert {p.dtype for p in patch.attached(unet)["IN01"].operator.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert unet(torch.randn(1, 4, 16, 16).bfloat16(), 3, torch.randn(1, 7, 8).bfloat16()).sample.isfinite().all()


def test_operators_are_as_frozen_as_what_they_replace(file):
    for trains in (False, True):
        unet = make_unet().requires_grad_(trains)
        sd_hyena.load_hyena(unet, file)
        assert {p.requires_grad for p in patch.attached(unet)["IN01"].operator.parameters()} == {trains}
        sd_hyena.set_hyena_enabled(unet, False)
        unet.requires_grad_(not trains)
        sd_hyena.set_hyena_enabled(unet, True)
        assert {p.requires_grad for p in unet.parameters()} == {not trains}


@pytest.mark.compatibility("Hosts", "a plain state dict into a patched UNet", "is the attention's; operators stay")
def test_plain_weights_go_to_the_attention(file, expected):
    unet, other = make_unet(), make_unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    plain, state = run_unet(other), {name: tensor.clone() for name, tensor in other.state_dict().items()}
    sd_hyena.load_hyena(unet, file)
    sd_hyena.load_hyena(other, file)
    unet.load_state_dict(state)
    assert torch.equal(run_unet(unet), run_unet(other))
    sd_hyena.unload_hyena(unet)
    assert torch.equal(run_unet(unet), plain)


@pytest.mark.compatibility("Hosts", "DataParallel around a patched UNet", "layers switch and unload inside it")
def test_data_parallel(file, expected):
    unet = torch.nn.DataParallel(make_unet())
    sd_hyena.load_hyena(unet, file)
    assert torch.equal(run_unet(unet.module), expected[1])
    sd_hyena.unload_hyena(unet)
    assert torch.equal(run_unet(unet.module), expected[0])


def test_cross_attention_is_no_self_attention():
    unet = make_unet(only_cross_attention=(True, True, True, False))
    assert list(find_targets(unet)) == ["M00"]
