"""LoRA and Hyena in any order of two loads and two unloads: what remains is what the remaining steps would give."""

import itertools
import logging

import diffusers
import pytest
import torch
from conftest import make_unet as make_any_unet
from conftest import run_unet, trained
from peft import LoraConfig, get_peft_model_state_dict

import sd_hyena
from sd_hyena import checkpoint, hyena_attention
from sd_hyena.config import OperatorConfig
from sd_hyena.fingerprint import fingerprint
from sd_hyena.targets import find_targets

NAMES = ["IN01", "M00", "OUT02"]
EVERYWHERE, SELF_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"], ["attn1.to_q", "attn1.to_v", "attn1.to_out.0"]


def make_unet():
    """Four self-attention layers, one of which stays attention."""
    return make_any_unet(
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def lora(modules):
    """A LoRA's tensors that do something, for all of a UNet's modules of these names."""
    unet = make_unet()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules))
    torch.manual_seed(5)
    state = get_peft_model_state_dict(unet)
    return {f"unet.{name}": 0.5 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file in each form."""
    folder, targets = tmp_path_factory.mktemp("forms"), find_targets(make_unet())
    for form in ("full", "core"):
        operators = {
            name: trained(OperatorConfig(targets[name].dim, 4, 4, attention_heads=targets[name].heads, form=form), n)
            for n, name in enumerate(NAMES)
        }
        checkpoint.save(folder / f"{form}.safetensors", operators)
    return folder


def make_pipe():
    """A pipeline of a UNet alone: what takes LoRAs as a user gives them."""
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        unet=make_unet(), scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **nothing
    )


def load_lora(pipe, tensors):
    pipe.load_lora_weights(dict(tensors), adapter_name="style")


def after(file, tensors, steps, pipe=None):
    """The UNet's output after each step, and its keys at the end."""
    pipe = pipe or make_pipe()
    do = {
        "+lora": lambda: load_lora(pipe, tensors),
        "-lora": pipe.unload_lora_weights,
        "+hyena": lambda: sd_hyena.load_hyena(pipe, file),
        "-hyena": lambda: sd_hyena.unload_hyena(pipe),
        "off": lambda: sd_hyena.set_hyena_enabled(pipe, False),
        "on": lambda: sd_hyena.set_hyena_enabled(pipe, True),
    }
    outputs = []
    for step in steps:
        do[step]()
        outputs.append(run_unet(pipe.unet))
    return outputs, list(pipe.unet.state_dict())


def orders():
    for steps in itertools.permutations(["+lora", "-lora", "+hyena", "-hyena"]):
        if all(steps.index(f"+{what}") < steps.index(f"-{what}") for what in ("lora", "hyena")):
            yield steps


@pytest.mark.compatibility("LoRA", "two loads and two unloads in any order", "what remains is right, bit for bit")
@pytest.mark.parametrize("form", ["full", "core"])
@pytest.mark.parametrize("modules", [EVERYWHERE, SELF_ATTENTION], ids=["everywhere", "attn1"])
def test_any_order_of_loading_and_unloading(form, modules, files):
    tensors, file = lora(modules), files / f"{form}.safetensors"
    alone = {(): run_unet(make_unet())}
    alone["lora",] = after(file, tensors, ["+lora"])[0][0]
    alone["hyena",] = after(file, tensors, ["+hyena"])[0][0]
    alone["hyena", "lora"] = after(file, tensors, ["+lora", "+hyena"])[0][1]
    assert len({output.sum().item() for output in alone.values()}) == 4
    pipe = make_pipe()  # each order leaves it as it was
    for steps in orders():
        outputs, keys = after(file, tensors, steps, pipe)
        there = set()
        for step, output in zip(steps, outputs, strict=True):
            (there.add if step[0] == "+" else there.discard)(step[1:])
            assert torch.equal(output, alone[tuple(sorted(there))]), f"{steps} after {step}"
        assert keys == list(make_unet().state_dict())


@pytest.mark.compatibility("LoRA", "loaded while Hyena is switched off, or the other way round", "both are there again")
@pytest.mark.parametrize("form", ["full", "core"])
def test_lora_while_hyena_is_off(form, files):
    tensors, file = lora(EVERYWHERE), files / f"{form}.safetensors"
    both = after(file, tensors, ["+lora", "+hyena"])[0][-1]
    just_lora = after(file, tensors, ["+lora"])[0][-1]
    outputs, _ = after(file, tensors, ["+hyena", "off", "+lora", "on", "off", "-hyena", "-lora"])
    assert torch.equal(outputs[2], just_lora)
    assert torch.equal(outputs[3], both)
    assert torch.equal(outputs[4], just_lora)
    assert torch.equal(outputs[5], just_lora)
    assert torch.equal(outputs[6], run_unet(make_unet()))


@pytest.mark.compatibility(
    "LoRA", "on layers that full Hyena replaces", "no effect there; one line says so and what to do"
)
@pytest.mark.parametrize("steps", [("+lora", "+hyena"), ("+hyena", "+lora")])
def test_one_line_says_what_has_no_effect(steps, files, caplog):
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        after(files / "full.safetensors", lora(EVERYWHERE), steps)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("sd_hyena")]
    assert "IN01, M00, OUT02" in line
    assert "core" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        after(files / "core.safetensors", lora(EVERYWHERE), steps)
        after(files / "full.safetensors", lora(["attn2.to_q"]), steps)
    assert not [r for r in caplog.records if r.name.startswith("sd_hyena")]


@pytest.mark.compatibility("LoRA", "of self-attention alone, on full Hyena", "loads without an error")
def test_a_lora_of_replaced_layers_alone_loads_onto_hyena(files):
    tensors = {name: tensor for name, tensor in lora(SELF_ATTENTION).items() if "up_blocks.1.attentions.1" not in name}
    outputs, _ = after(files / "full.safetensors", tensors, ["+hyena", "+lora", "-hyena"])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], after(None, tensors, ["+lora"])[0][0])


@pytest.mark.compatibility("LoRA", "scaling and several adapters", "live in core form")
def test_scales_of_adapters_act_on_core_layers(files):
    pipe = make_pipe()
    sd_hyena.load_hyena(pipe, files / "core.safetensors")
    before = run_unet(pipe.unet)
    load_lora(pipe, lora(SELF_ATTENTION))
    strong = run_unet(pipe.unet)
    more = {name: -2 * tensor for name, tensor in lora(SELF_ATTENTION).items()}
    pipe.load_lora_weights(more, adapter_name="other")
    outputs = []
    for weights in ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0]):
        pipe.set_adapters(["style", "other"], weights)
        outputs.append(run_unet(pipe.unet))
    torch.testing.assert_close(outputs[0], before)
    torch.testing.assert_close(outputs[1], strong)
    assert not any(torch.allclose(outputs[2], each) for each in (before, strong))
    pipe.delete_adapters("other")
    pipe.set_adapters(["style"])
    torch.testing.assert_close(run_unet(pipe.unet), strong)


@pytest.mark.compatibility("LoRA", "fused and unfused around loading and unloading", "the fused attention comes back")
@pytest.mark.parametrize("fuse_first", [True, False])
@pytest.mark.parametrize("form", ["full", "core"])
def test_fusing(form, fuse_first, files):
    pipe, tensors = make_pipe(), lora(EVERYWHERE)
    load_lora(pipe, tensors)
    plain_lora = run_unet(pipe.unet)
    if fuse_first:
        pipe.fuse_lora(components=["unet"])
    sd_hyena.load_hyena(pipe, files / f"{form}.safetensors")
    if not fuse_first:
        pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(
        run_unet(pipe.unet), after(files / f"{form}.safetensors", tensors, ["+lora", "+hyena"])[0][-1]
    )
    sd_hyena.unload_hyena(pipe)
    torch.testing.assert_close(run_unet(pipe.unet), plain_lora)
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(run_unet(pipe.unet), run_unet(make_unet()))


@pytest.mark.compatibility("LoRA", "peft's get_peft_model", "layers switch and unload inside the wrapper")
@pytest.mark.parametrize("form", ["full", "core"])
def test_a_unet_that_peft_has_wrapped(form, files):
    from peft import get_peft_model

    pipe = make_pipe()
    plain = run_unet(pipe.unet)
    sd_hyena.load_hyena(pipe, files / f"{form}.safetensors")
    hyena = run_unet(pipe.unet)
    pipe.unet = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))
    assert list(sd_hyena.attached(pipe)) == NAMES
    torch.testing.assert_close(run_unet(pipe.unet), hyena)
    sd_hyena.set_hyena_enabled(pipe, False)
    torch.testing.assert_close(run_unet(pipe.unet), plain)
    sd_hyena.set_hyena_enabled(pipe, True)
    pipe.unet = pipe.unet.unload()
    assert torch.equal(run_unet(pipe.unet), hyena)
    sd_hyena.unload_hyena(pipe)
    assert torch.equal(run_unet(pipe.unet), plain)


@pytest.mark.compatibility("LoRA", "adapters for all linear layers, on Hyena", "leave the operators alone")
@pytest.mark.parametrize("form", ["full", "core"])
def test_adapters_never_wrap_an_operator(form, files, tmp_path):
    unet = make_unet()
    sd_hyena.load_hyena(unet, files / f"{form}.safetensors")
    before = run_unet(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(run_unet(unet), before)  # it begins as nothing
    assert not [name for name, _ in unet.named_modules() if ".operator." in name and "lora" in name]
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    sd_hyena.save_hyena(unet, tmp_path / "again.safetensors")
    assert checkpoint.load(tmp_path / "again.safetensors").layers.keys() == set(NAMES)


def test_the_line_is_said_when_layers_are_switched_on_and_not_of_adapters_that_are_gone(files, caplog):
    def said():
        lines = [r.getMessage() for r in caplog.records if "LoRA's part" in r.getMessage()]
        caplog.clear()
        return len(lines)

    pipe, file = make_pipe(), files / "full.safetensors"
    sd_hyena.load_hyena(pipe, file)
    sd_hyena.set_hyena_enabled(pipe, False)
    load_lora(pipe, lora(EVERYWHERE))
    assert said() == 0
    sd_hyena.set_hyena_enabled(pipe, True)
    assert said() == 1
    sd_hyena.unload_hyena(pipe)
    pipe.disable_lora()
    sd_hyena.load_hyena(pipe, file)
    assert said() == 0
    sd_hyena.unload_hyena(pipe)
    pipe.enable_lora()
    pipe.delete_adapters("style")
    sd_hyena.load_hyena(pipe, file)
    assert said() == 0


def test_a_lora_that_is_not_fused_is_not_the_teachers(files):
    pipe = make_pipe()
    before = fingerprint(pipe)
    load_lora(pipe, lora(EVERYWHERE))
    assert fingerprint(pipe) == before


@pytest.fixture(autouse=True)
def _said():
    hyena_attention.say_once.cache_clear()
