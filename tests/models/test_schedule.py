"""What a model predicts, and how its noise ends: marks in files, options, and what becomes of the scheduler."""

import logging
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_hyena import cli
from sd_hyena.errors import UsageError
from sd_hyena.families import FAMILIES
from sd_hyena.models import ModelChoices, load_pipeline, locate
from sd_hyena.models.schedule import Marked, read_marks, set_schedule
from sd_hyena.models.single_file import open_checkpoint

EPSILON, V = "epsilon", "v_prediction"


def schedule(pipe):
    config = pipe.scheduler.config
    return config.get("prediction_type", EPSILON), bool(config.get("rescale_betas_zero_snr"))


@pytest.fixture
def marked(thin_model, tmp_path):
    """``marked(name, tensors, metadata)``: a family's thin file with marks."""

    def make(name, tensors=(), metadata=None):
        held = load_file(thin_model(name).path)
        save_file(held | {key: torch.ones(1) for key in tensors}, tmp_path / "x.safetensors", metadata)
        return str(tmp_path / "x.safetensors")

    return make


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ((), None, (EPSILON, False)),
        (("v_pred",), None, (V, False)),
        (("v_pred", "ztsnr"), None, (V, True)),
        ((), {"modelspec.prediction_type": "v"}, (V, False)),
        ((), {"modelspec.prediction_type": "epsilon"}, (EPSILON, False)),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (V, True)),
        ((), {"ss_v_parameterization": "1"}, (V, False)),
        ((), {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, (EPSILON, False)),
    ],
    ids=["none", "v_pred", "ztsnr", "modelspec v", "modelspec epsilon", "kohya", "kohya 1", "kohya, neither"],
)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_marks_in_files_are_read(name, tensors, metadata, expected, marked, caplog):
    checkpoint = open_checkpoint(marked(name, tensors, metadata), "x")
    kind = getattr(diffusers, checkpoint.family.index()["scheduler"][1])
    pipe = SimpleNamespace(scheduler=kind.from_config(checkpoint.family.config("scheduler")))
    with caplog.at_level(logging.INFO, "sd_hyena"):
        set_schedule(pipe, "x", None, read_marks(checkpoint))
    assert schedule(pipe) == expected
    assert ("is marked as" in caplog.text) == (expected != (EPSILON, False))
    assert pipe.scheduler.config.clip_sample is False
    if expected[1]:
        pipe.scheduler.set_timesteps(4)
        assert pipe.scheduler.timesteps[0] == 999
        assert pipe.scheduler.config.timestep_spacing == "trailing"
    else:
        assert type(pipe.scheduler) is kind


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.compatibility(
    "Models", "marks of v-prediction and zero terminal SNR in single files", "obeyed, and a line says so"
)
def test_marked_files_load_with_their_schedule(name, marked):
    assert schedule(load_pipeline(locate(marked(name, ("v_pred", "ztsnr"))))) == (V, True)


@pytest.mark.parametrize(("value", "expected"), [('"v"', V), ("v", V), ('"eps"', EPSILON)])
@pytest.mark.compatibility(
    "Models", "a `.yaml` of LDM beside a single file", "its v-prediction is obeyed, and a line says so"
)
def test_a_configuration_beside_the_file_is_read(value, expected, marked, tmp_path):
    path = marked("sd15")
    (tmp_path / "x.yaml").write_text(f"model:\n  params:\n    parameterization: {value}\n    linear_start: 0.00085\n")
    assert schedule(load_pipeline(locate(path)))[0] == expected


def test_only_marks_that_are_obeyed_are_told(marked, caplog):
    with caplog.at_level(logging.INFO, "sd_hyena"):
        pipe = SimpleNamespace(scheduler=diffusers.PNDMScheduler())
        set_schedule(pipe, "x", ModelChoices(prediction_type=EPSILON, zero_snr="on"), Marked(V, False))
    assert [record.getMessage() for record in caplog.records] == [
        "model x: its PNDMScheduler knows no rescale_betas_zero_snr: DDIM takes its place"
    ]


@pytest.mark.parametrize(("spread", "expected"), [(0.01, EPSILON), (0.2, V)])
@pytest.mark.compatibility(
    "Models", "SD 2 files, which do not say what they predict", "told by their weights; a line says so"
)
def test_stable_diffusion_2_is_told_by_its_weights(spread, expected, thin_model, tmp_path, caplog):
    tensors = load_file(thin_model("sd21").path)
    mark = tensors[FAMILIES["sd21"].v_mark]
    tensors[FAMILIES["sd21"].v_mark] = spread * torch.tensor([-1.0, 1.0]).repeat(len(mark) // 2)
    save_file(tensors, tmp_path / "x.safetensors")
    source = locate(str(tmp_path / "x.safetensors"))
    with caplog.at_level(logging.INFO, "sd_hyena"):
        assert schedule(load_pipeline(source)) == (expected, False)
    assert f"taken for {expected} (--prediction_type says otherwise)" in caplog.text
    other = EPSILON if expected == V else V
    assert schedule(load_pipeline(source, choices=ModelChoices(prediction_type=other))) == (other, False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (V, True)),
        ({"prediction_type": EPSILON}, (EPSILON, True)),
        ({"zero_snr": "off"}, (V, False)),
        ({"prediction_type": V, "zero_snr": "on"}, (V, True)),
    ],
)
@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_what_the_user_says_comes_first(kind, options, expected):
    pipe = SimpleNamespace(scheduler=getattr(diffusers, kind)())
    set_schedule(pipe, "x", ModelChoices(**options), Marked(V, True))
    assert schedule(pipe) == expected


def test_a_scheduler_that_agrees_is_left_alone(pipe):
    before = pipe.scheduler
    set_schedule(pipe, "demo", ModelChoices(prediction_type=V, zero_snr="on"))
    assert pipe.scheduler is before


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("generate", ["-p", "x", "-n", 1]),
        ("train", ["-n", 1]),
        ("prepare", []),
        ("evaluate", ["-n", 1, "-y", "demo"]),
        ("anatomy", []),
        ("benchmark image", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.compatibility(
    "Samplers", "`--prediction_type`, `--zero_snr` with every command that loads a model", "works"
)
def test_every_command_hands_the_choices_on(command, options, monkeypatch, tmp_path, capsys):
    caught = []

    def load(source, device="cpu", dtype=None, choices=None):
        caught.append(choices)
        raise UsageError("enough seen")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sd_hyena.models.load_pipeline", load)
    monkeypatch.setattr("sd_hyena.benchmark.pipelines.load_pipeline", load)
    words = [*command.split(), "-m", "demo", *map(str, options)]
    assert cli.main([*words, "--prediction-type", "epsilon", "--zero_snr=off", "--device", "cpu"]) == 2
    assert "enough seen" in capsys.readouterr().err
    assert (caught[0].prediction_type, caught[0].zero_snr, caught[0].variant) == ("epsilon", "off", "")


def test_choices_need_a_model(capsys):
    words = ["benchmark", "image", "--random_weights", "sd15", "--zero_snr", "on"]
    assert cli.main(words) == 2
    assert "--zero_snr says something of a model: give one with -m/--model" in capsys.readouterr().err
    with pytest.raises(UsageError, match="prediction_type must be one of auto, epsilon, v_prediction, got 'sample'"):
        ModelChoices(prediction_type="sample").check_model_choices("demo")
