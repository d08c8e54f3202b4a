"""Drawing stops at the first number that is not finite, and says where."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sd_hyena import checkpoint, models
from sd_hyena.cli import main
from sd_hyena.distill.encode import prompt_states
from sd_hyena.distill.logbook import Logbook
from sd_hyena.errors import SdHyenaError
from sd_hyena.evaluate.errors import _predict
from sd_hyena.evaluate.run import _Work
from sd_hyena.evaluate.settings import EvaluateSettings
from sd_hyena.generate.sampling import NotFiniteError, sample
from sd_hyena.generate.sparing import Sparing
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets

QUICK = "-m demo -W 64 -H 64 -s 3 -n 1"
DRAW = ["generate", *QUICK.split(), "-p", "a frog", "-k", "7"]


@pytest.fixture
def broken(demo_pipe, monkeypatch):
    """Has the commands use a bundled model with a value of one weight changed: ``broken(component, weight, value)``."""
    changed = []

    def change(component, weight, value):
        tensor = getattr(demo_pipe, component).get_parameter(weight)
        changed.append((tensor, tensor.detach().clone()))
        with torch.no_grad():
            tensor.flatten()[0] = value

    monkeypatch.setattr(models, "load_pipeline", lambda *given, **options: demo_pipe)
    yield change
    with torch.no_grad():
        for tensor, before in changed:
            tensor.copy_(before)


@pytest.fixture
def overflowing(demo_pipe, monkeypatch):
    """Has the commands use a bundled model whose UNet overflows from its fifth call on."""
    calls = []

    def overflow(module, inputs, output):
        calls.append(1)
        return (output[0] * (torch.inf if len(calls) > 4 else 1),)

    monkeypatch.setattr(models, "load_pipeline", lambda *given, **options: demo_pipe)
    handle, scheduler = demo_pipe.unet.register_forward_hook(overflow), demo_pipe.scheduler
    yield
    handle.remove()
    demo_pipe.scheduler = scheduler


def stops(words, capsys):
    """The one line that a command ends with, after what it says of its sampler."""
    assert main(words) == 1
    *before, error = capsys.readouterr().err.splitlines(keepends=True)
    assert all(line.startswith("sd-hyena: sampler ") for line in before)
    return error


@pytest.mark.compatibility("Prompts and paths", "NaN or infinity while drawing", "stops: names step, entry and weight")
@pytest.mark.reliability(4, 13)
@pytest.mark.parametrize(
    ("component", "weight", "where"),
    [
        ("unet", "conv_in.weight", "step 1 of 3: the latents are"),
        ("text_encoder", "final_layer_norm.bias", "step 1 of 3: the latents are"),
        ("vae", "decoder.conv_out.bias", "after the last step: the VAE's picture is"),
    ],
)
def test_a_weight_that_is_not_finite(tmp_path, capsys, broken, component, weight, where):
    broken(component, weight, torch.nan)
    error = stops([*DRAW, "-o", str(tmp_path)], capsys)
    assert (
        f"plain model, seed 7: {where} not finite: {component}'s weight {weight} holds NaN or infinite values" in error
    )
    assert not list(tmp_path.iterdir())


def test_the_entry_is_named_and_earlier_pictures_are_kept(tmp_path, capsys, pipe, monkeypatch):
    target = find_targets(pipe.unet)["IN01"]
    operator = build(OperatorConfig(target.dim, 8, 8, attention_heads=target.heads))
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.fill_(1e38)  # finite, but nothing that follows is
    checkpoint.save(tmp_path / "huge.safetensors", {"IN01": operator})
    monkeypatch.setattr(models, "load_pipeline", lambda *options: pipe)
    error = stops([*DRAW, "-y", f",{tmp_path}/huge.safetensors", "-o", str(tmp_path)], capsys)
    assert f"{tmp_path}/huge.safetensors, seed 7: step 1 of 3: the latents are not finite" in error
    assert [p.name for p in tmp_path.glob("*.png")] == ["image_000.png"]


@pytest.mark.parametrize(("scheduler", "step"), [("ddim", 5), ("heun", 3)])
def test_the_step_is_counted_as_it_was_asked_for(tmp_path, capsys, overflowing, scheduler, step):
    words = [*DRAW, "-s", "9", "--scheduler", scheduler, "-o", str(tmp_path)]
    assert f"step {step} of 9: the latents are not finite: use another sampler" in stops(words, capsys)


def test_evaluation_names_the_row(tmp_path, capsys, broken):
    target = find_targets(models.unet_skeleton(models.locate("demo")))["OUT11"]
    operator = build(OperatorConfig(target.dim, 8, 8, attention_heads=target.heads))
    checkpoint.save(tmp_path / "a.safetensors", {"OUT11": operator})
    broken("unet", "conv_out.bias", torch.inf)
    words = ["evaluate", *QUICK.split(), "-y", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "out")]
    assert "teacher: step 1 of 3: the latents are not finite: unet's weight conv_out.bias" in stops(words, capsys)
    assert not (tmp_path / "out").exists()


def test_a_training_run_goes_on_without_pictures_in_its_log(pipe, caplog):
    shown = []
    tracker = SimpleNamespace(log_images=lambda pictures, step, dataformats: shown.append(pictures))
    book = Logbook(SimpleNamespace(trackers=[tracker]), pipe, ["a frog", "a fox"], (64, 64), 1)
    target = find_targets(pipe.unet)["IN01"]
    operator = build(OperatorConfig(target.dim, 8, 8, attention_heads=target.heads))
    book.pictures(1, {"IN01": operator})
    (sheet,) = shown[0].values()
    assert sheet.shape == (1, 128, 128, 3)
    assert sheet.dtype == np.uint8
    with torch.no_grad():
        next(operator.parameters()).fill_(torch.nan)
    with caplog.at_level(logging.WARNING):
        book.pictures(2, {"IN01": operator})
    assert len(shown) == 1
    assert caplog.messages[0].startswith("no pictures in the log at step 2: step 1 of 1: the latents are not finite")
    assert not hasattr(pipe.unet.get_submodule(target.path), "operator")


@pytest.mark.reliability(4, 13)
@pytest.mark.parametrize(("component", "weight"), [("vae", "decoder.conv_out.bias"), ("unet", "conv_in.weight")])
def test_a_training_run_ends_where_the_teacher_cannot_draw(pipe, broken, component, weight):
    broken(component, weight, torch.nan)
    book = Logbook(SimpleNamespace(trackers=[]), pipe, ["a frog"], (64, 64), 1)
    with pytest.raises(NotFiniteError, match=f"{component}'s weight {weight} holds NaN or infinite values"):
        book.pictures(1, {})


@pytest.mark.reliability(4, 13)
def test_states_predictions_and_scores_that_are_not_finite(pipe, broken):
    score = [lambda drawing, teacher, prompts: {"clip_score": torch.nan}]
    target = find_targets(pipe.unet)["OUT11"]
    operator = build(OperatorConfig(target.dim, 8, 8, attention_heads=target.heads))
    settings = EvaluateSettings("demo", width=64, height=64, steps=1, layer_samples=0, no_yardstick=True, hyena="x")
    work = _Work(pipe, settings, ["a frog"], [0], score, lambda text: None, lambda *counts: None, Sparing(pipe))
    with pytest.raises(SdHyenaError, match=r"^teacher: scores\.clip_score is not finite: use another sampler"):
        work.evaluate({"a": []}, {"a": {"OUT11": operator}})
    broken("text_encoder", "final_layer_norm.bias", torch.nan)
    with pytest.raises(SdHyenaError, match="states of 'a frog' are not finite: text_encoder's weight final_layer_norm"):
        prompt_states(pipe, ["a frog"])
    broken("unet", "conv_out.bias", torch.nan)
    call = {"sample": torch.zeros(1, pipe.unet.config.in_channels, 8, 8), "timestep": 1}
    with pytest.raises(NotFiniteError, match="the UNet's prediction is not finite: "):
        _predict(pipe, call | {"encoder_hidden_states": torch.zeros(1, 7, 64)})


def test_nothing_is_left_on_the_pipeline(pipe):
    before = len(pipe.vae.decoder._forward_hooks)
    sample(pipe, ["a frog"], [0], width=64, height=64, num_inference_steps=1)
    assert len(pipe.vae.decoder._forward_hooks) == before
