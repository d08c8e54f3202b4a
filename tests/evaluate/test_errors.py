"""Errors of layers and UNet: nothing for the teacher's own attention, 1 for a constant, and as defined otherwise."""

import copy
import types

import pytest
import torch
from out_of_memory import fail
from torch import nn

from sd_hyena import patch
from sd_hyena.evaluate.errors import TeacherSweep
from sd_hyena.evaluate.inputs import HeldOut, band_edges
from sd_hyena.evaluate.pictures import compare, draw
from sd_hyena.likeness import MAX_PSNR
from sd_hyena.nn import OperatorConfig
from sd_hyena.targets import find_targets

PROMPTS = ["a frog on the left, red background", "two pigs, blue background"]
LAYERS = ["IN01", "OUT11"]


class Stand(nn.Module):
    """A stand-in for an operator: the teacher's attention, with its output changed."""

    def __init__(self, attention, change=lambda y: y):
        super().__init__()
        self.attention, self.change, self.core = copy.deepcopy(attention), change, False
        self.branches, self.off = (), ""
        self.config = OperatorConfig(attention.query_dim, 8, 8, attention_heads=attention.heads)

    def forward(self, x, size, projections=None):
        return self.change(self.attention(x))


def constant(y):
    """Each channel's mean over a batch, which here is a whole band."""
    return y.mean((0, 1), keepdim=True).expand_as(y)


@pytest.fixture
def inputs(pipe):
    latents = torch.randn(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return HeldOut(pipe, latents, PROMPTS, bands=3, samples=3)


def stands(pipe, change=lambda y: y):
    targets = find_targets(pipe.unet)
    return {name: Stand(pipe.unet.get_submodule(targets[name].path), change) for name in LAYERS}


def test_bands_cover_every_timestep_once():
    assert band_edges(1000, 5) == [(0, 199), (200, 399), (400, 599), (600, 799), (800, 999)]
    edges = band_edges(1000, 3)
    assert [t for first, last in edges for t in range(first, last + 1)] == list(range(1000))


def test_inputs_lie_in_their_bands_and_come_with_and_without_the_prompt(pipe, inputs):
    calls = list(inputs)
    assert len(calls) == len(inputs) == 3
    for batch in calls:
        first, last = inputs.edges[batch.band]
        t = batch.call["timestep"]
        assert ((t >= first) & (t <= last)).all()
        assert len(set(t[:3].tolist())) == 3
        assert torch.equal(t[:3], t[3:])
        assert torch.equal(batch.call["sample"][:3], batch.call["sample"][3:])
        states = batch.call["encoder_hidden_states"]
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
        asked = pipe.encode_prompt(PROMPTS[batch.band * 3 % 2], "cpu", 1, False)[0]
        assert torch.allclose(states[3:], empty.expand(3, -1, -1), atol=1e-5)
        assert torch.allclose(states[:1], asked, atol=1e-5)
    noise = [batch.call["sample"] for batch in calls]
    assert torch.equal(noise[2], list(inputs)[2].call["sample"])


def test_samples_are_cut_into_batches_without_losing_one(pipe):
    inputs = HeldOut(pipe, torch.randn(2, pipe.unet.config.in_channels, 8, 8), PROMPTS, bands=2, samples=6)
    sizes = [len(batch.call["sample"]) for batch in inputs]
    assert sizes == [8, 4, 8, 4]
    assert len(inputs) == 4


def test_two_text_encoders_give_pooled_text_and_the_pictures_size(pipe):
    """As for SDXL, whose pipeline encodes to states, empty states, pooled and empty pooled text."""

    def encode(prompt, **options):
        value = float(len(prompt))
        return [torch.full((1, 7, 4), value), torch.zeros(1, 7, 4), torch.full((1, 6), -value), torch.ones(1, 6)]

    sizes = {"projection_class_embeddings_input_dim": 6 + 6 * 4, "addition_time_embed_dim": 4}
    config = types.SimpleNamespace(in_channels=4, **sizes)
    unet = types.SimpleNamespace(device=pipe.unet.device, dtype=pipe.unet.dtype, config=config)
    both = types.SimpleNamespace(unet=unet, scheduler=pipe.scheduler, vae_scale_factor=8, encode_prompt=encode)
    (batch,) = HeldOut(both, torch.zeros(2, 4, 8, 12), ["a", "bcd"], bands=1, samples=2)
    assert batch.call["encoder_hidden_states"][:, 0, 0].tolist() == [1, 3, 0, 0]
    added = batch.call["added_cond_kwargs"]
    assert added["text_embeds"][:, 0].tolist() == [-1, -3, 1, 1]
    assert added["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 4


def test_the_teachers_own_attention_has_no_error(pipe, inputs):
    operators = stands(pipe)
    sweep = TeacherSweep(pipe, inputs, {"same": operators})
    assert set(sweep.layers["same"]) == set(LAYERS)
    for figures in sweep.layers["same"].values():
        assert figures["relative_error"] < 1e-10
        assert figures["cosine"] == pytest.approx(1)
    options = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 5.0}
    teacher = draw(pipe, PROMPTS, [0, 1], **options)
    patch.attach(pipe.unet, operators)
    assert all(f["relative_error"] < 1e-10 for f in sweep.unet_errors(5.0).values())
    distances = compare(teacher, draw(pipe, PROMPTS, [0, 1], **options))
    assert distances.psnr == [MAX_PSNR, MAX_PSNR]
    assert max(distances.latent) < 1e-8


@pytest.mark.reliability(14)
def test_errors_are_the_same_in_smaller_calls(pipe, inputs, monkeypatch, caplog):
    """The third call, and whatever has more samples than one from then on, runs out of memory."""
    wanted = TeacherSweep(pipe, inputs, {"scaled": stands(pipe, lambda y: 1.1 * y)})
    guided = wanted.unet_errors(5.0)
    fail(monkeypatch, pipe.unet, "forward", lambda n, sample, *_, **__: n > 1 and len(sample) > 2)
    again = TeacherSweep(pipe, inputs, {"scaled": stands(pipe, lambda y: 1.1 * y)})
    assert caplog.messages == [f"out of memory while measuring errors: {n} at a time from here" for n in (2, 1)]
    for name in LAYERS:
        got, expected = again.layers["scaled"][name], wanted.layers["scaled"][name]
        assert got["relative_error"] == pytest.approx(expected["relative_error"], rel=1e-3)
    for a, b in zip(wanted.predictions, again.predictions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert again.unet_errors(5.0).keys() == guided.keys()


def test_a_constant_scores_1_in_every_band(pipe, inputs):
    layers = TeacherSweep(pipe, inputs, {"constant": stands(pipe, constant)}).layers["constant"]
    for figures in layers.values():
        assert figures["relative_error"] == pytest.approx(1, rel=1e-4)
        assert [band["relative_error"] for band in figures["bands"]] == pytest.approx([1, 1, 1], rel=1e-4)


def test_layers_are_measured_on_the_teachers_activations_student_by_student(pipe, inputs):
    """OUT11's input is the teacher's, whatever IN01 of the same student does; a scaled output has a known error."""
    scaled = stands(pipe, lambda y: 1.1 * y)
    layers = TeacherSweep(pipe, inputs, {"scaled": scaled, "same": stands(pipe)}).layers
    alone = TeacherSweep(pipe, inputs, {"scaled": {"OUT11": scaled["OUT11"]}}).layers
    assert layers["scaled"]["OUT11"] == alone["scaled"]["OUT11"]
    assert layers["scaled"]["OUT11"]["cosine"] == pytest.approx(1)
    assert layers["scaled"]["OUT11"]["relative_error"] >= 0.01  # |0.1 t|^2 / |t - mean|^2
    assert layers["same"]["OUT11"]["relative_error"] < 1e-10


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_unet_errors_follow_their_definition(pipe, inputs, guidance):
    sweep = TeacherSweep(pipe, inputs, {})
    with torch.no_grad():
        teacher = [pipe.unet(**batch.call).sample.double() for batch in inputs]
        patch.attach(pipe.unet, stands(pipe, constant))
        student = [pipe.unet(**batch.call).sample.double() for batch in inputs]
    errors = sweep.unet_errors(guidance)
    assert set(errors) == ({"conditional", "guided"} if guidance else {"conditional"})
    for name, figures in errors.items():
        expected = []
        for s, t in zip(student, teacher, strict=True):
            weight = guidance if name == "guided" else 1
            s, t = (p[3:] + weight * (p[:3] - p[3:]) for p in (s, t))
            spread = (t - t.mean((0, 2, 3), keepdim=True)).square().sum()
            expected.append(((s - t).square().sum() / spread).item())
        assert [band["relative_error"] for band in figures["bands"]] == pytest.approx(expected, rel=1e-3)
        assert figures["relative_error"] == pytest.approx(sum(expected) / 3, rel=1e-3)
        assert min(expected) > 1e-4
