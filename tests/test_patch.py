"""Attaching is all-or-nothing, reversible, and sees the true grid."""

import copy
import gc
import logging

import pytest
import torch
from conftest import make_unet, run_unet

import sd_hyena
from sd_hyena import patch
from sd_hyena.errors import UsageError
from sd_hyena.grid import grid_mask
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets


def operators(unet, names, **choices):
    torch.manual_seed(1)
    found = find_targets(unet)
    return {n: build(OperatorConfig(found[n].dim, 4, 4, **({"attention_heads": 2} | choices))) for n in names}


def tensors_alive():
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def operator_of(dim, **choices):
    return build(OperatorConfig(dim, 4, 4, attention_heads=2, **choices))


@pytest.mark.reliability(15)
@pytest.mark.parametrize("form", ["full", "core"])
def test_attach_changes_and_detach_restores_bit_for_bit(unet, form):
    before, keys = run_unet(unet), list(unet.state_dict())
    tensors = tensors_alive()
    for _ in range(100):
        patch.attach(unet, operators(unet, ["IN01", "M00", "OUT07"], form=form))
        assert list(patch.attached(unet)) == ["IN01", "M00", "OUT07"]
        patch.detach(unet)
    assert tensors_alive() == tensors
    assert list(unet.state_dict()) == keys
    assert torch.equal(run_unet(unet), before)
    assert not any(m._forward_pre_hooks for m in unet.modules())
    patch.attach(unet, operators(unet, ["IN01"], form=form))
    assert not torch.equal(run_unet(unet), before)


@pytest.mark.parametrize("grid", [(16, 16), (18, 22), (9, 11), (8, 24)])
def test_the_grid_is_the_true_one(unet, grid):
    everything = list(find_targets(unet))
    patch.attach(unet, operators(unet, everything))
    seen = {}
    for name, layer in patch.attached(unet).items():
        layer.operator.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[1]}))
    run_unet(unet, *grid)
    assert seen == {name: target.grid(grid) for name, target in find_targets(unet).items()}


@pytest.mark.parametrize("form", ["full", "core"])
def test_enable_and_disable(unet, form):
    before, keys = run_unet(unet), list(unet.state_dict())
    patch.attach(unet, operators(unet, ["IN01", "OUT11"], form=form))
    student, student_keys = run_unet(unet), list(unet.state_dict())
    for _ in range(2):
        sd_hyena.set_hyena_enabled(unet, False)
        assert torch.equal(run_unet(unet), before)
        assert list(unet.state_dict()) == keys
        assert list(patch.attached(unet)) == ["IN01", "OUT11"]  # switched off, not gone
        sd_hyena.set_hyena_enabled(unet, True)
        assert torch.equal(run_unet(unet), student)
        assert list(unet.state_dict()) == student_keys
    sd_hyena.set_hyena_enabled(unet, False)
    patch.detach(unet)
    assert torch.equal(run_unet(unet), before)
    assert not any(m._forward_pre_hooks for m in unet.modules())


def test_one_of_two_attentions_of_a_transformer_can_be_replaced():
    """The grid is sent to all blocks of a transformer, and plain attention has no use for it."""
    unet = make_unet(transformer_layers_per_block=2)
    before = run_unet(unet)
    patch.attach(unet, operators(unet, ["IN01.1"]))
    student = run_unet(unet)
    assert not torch.equal(student, before)
    patch.attach(unet, operators(unet, ["IN01.0"]))
    assert not torch.equal(run_unet(unet), student)
    patch.detach(unet, ["IN01.1"])
    patch.detach(unet, ["IN01.0"])
    assert torch.equal(run_unet(unet), before)


def test_a_bad_operator_leaves_everything_untouched(unet):
    before = run_unet(unet)
    good = operators(unet, ["IN01"])
    for name, operator, message in [
        ("IN02", operator_of(12), "IN02 has 8 channels, but the operator has 12"),
        ("IN03", good["IN01"], "no self-attention layer IN03"),
        ("IN02", operator_of(8, inner_dim=16, form="core"), "projects to 8 channels"),
    ]:
        with pytest.raises(UsageError, match=message):
            patch.attach(unet, good | {name: operator})
        assert not patch.attached(unet)
    assert torch.equal(run_unet(unet), before)


def test_attaching_again_replaces_the_operator_and_keeps_the_original(unet):
    before = run_unet(unet)
    first, second = operators(unet, ["IN01"]), operators(unet, ["IN01"], operator="linear")
    patch.attach(unet, first)
    patch.attach(unet, second)
    assert patch.attached(unet)["IN01"].operator is second["IN01"]
    patch.detach(unet, ["IN01"])
    assert torch.equal(run_unet(unet), before)


def test_attention_processors_do_not_remove_hyena(unet):
    from diffusers.models.attention_processor import AttnProcessor

    patch.attach(unet, operators(unet, ["IN01"]))
    student = run_unet(unet)
    unet.set_attn_processor(AttnProcessor())
    unet.set_default_attn_processor()
    assert list(patch.attached(unet)) == ["IN01"]
    torch.testing.assert_close(run_unet(unet), student, atol=1e-5, rtol=1e-5)


def test_core_projections_stay_where_lora_looks_for_them(unet):
    path = find_targets(unet)["IN01"].path
    patch.attach(unet, operators(unet, ["IN01"], form="core"))
    assert f"{path}.to_q.weight" in unet.state_dict()
    before = run_unet(unet)
    with torch.no_grad():
        unet.get_submodule(path).to_v.weight.mul_(2)
    assert not torch.equal(run_unet(unet), before)
    layer = unet.get_submodule(path)
    wrapped = torch.nn.Sequential(layer.to_q)
    layer.to_q = wrapped
    patch.detach(unet)
    assert unet.get_submodule(path).to_q is wrapped


def test_masks_and_cross_attention_are_refused(unet):
    patch.attach(unet, operators(unet, ["IN01"]))
    layer = patch.attached(unet)["IN01"].attention
    x = torch.randn(1, 4, 8)
    grid = grid_mask(torch.zeros(1, 8, 2, 2))
    assert layer(x, attention_mask=grid, scale=1.0).shape == x.shape
    with pytest.raises(ValueError, match="no mask"):
        layer(x, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="attends to nothing else"):
        layer(x, encoder_hidden_states=x, attention_mask=grid)
    with pytest.raises(ValueError, match="size is unknown"):
        layer(x)


def test_saving_a_patched_unet_saves_the_original_and_warns(unet, tmp_path, caplog):
    before = run_unet(unet)
    patch.attach(unet, operators(unet, ["IN01"]))
    student = run_unet(unet)
    with caplog.at_level(logging.WARNING, "sd_hyena"):
        unet.save_pretrained(tmp_path)
    assert "save_hyena" in caplog.text
    assert torch.equal(run_unet(unet), student)
    assert torch.equal(run_unet(type(unet).from_pretrained(tmp_path)), before)


def test_a_copy_of_a_patched_unet_stands_alone(unet):
    patch.attach(unet, operators(unet, ["IN01"]))
    student = run_unet(unet)
    twin = copy.deepcopy(unet)
    patch.detach(unet)
    assert torch.equal(run_unet(twin), student)
    patch.detach(twin)
    assert torch.equal(run_unet(twin), run_unet(unet))


def test_attention_that_does_more_is_refused():
    unet = make_unet()
    unet.get_submodule(find_targets(unet)["IN02"].path).norm_q = torch.nn.LayerNorm(4)
    with pytest.raises(UsageError, match=r"IN02.*more than plain self-attention"):
        patch.attach(unet, operators(unet, ["IN01", "IN02"]))
    assert not patch.attached(unet)


def test_half_precision_unet_takes_a_float32_operator(unet):
    unet.to(torch.bfloat16)
    patch.attach(unet, operators(unet, ["IN01"]))
    x = torch.randn(1, 4, 16, 16).bfloat16()
    with torch.no_grad():
        y = unet(x, 3, torch.randn(1, 7, 8).bfloat16()).sample
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


def test_detach_follows_a_later_change_of_type(unet):
    patch.attach(unet, operators(unet, ["IN01"]))
    unet.to(torch.bfloat16)
    patch.detach(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


def test_a_causal_operator_too_short_for_the_image_is_named(unet):
    patch.attach(unet, operators(unet, ["IN01"], operator="causal"))
    patch.check_grid(unet, (4, 4))
    with pytest.raises(UsageError, match=r"IN01 sees 8 x 4 cells.*built for at most 16 tokens, not 32"):
        patch.check_grid(unet, (8, 4))
