"""``sd-hyena train --data noise``: nothing of the teacher is read but the layers, and figures say what they are on."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from demo.ldm_export import export
from safetensors.torch import load_file, save_file

from sd_hyena import checkpoint
from sd_hyena.cli import main
from sd_hyena.models import DEMO_DIR
from sd_hyena.tensors import Tensors

NOISE = shlex.split("-t IN01,M00 --data noise -W 64 -H 64 -b 8 -r 1e-3 -d 3 -s 0")


def train(model, folder, *options):
    logs = ["-l", str(folder.parent / "logs"), "-o", str(folder)]
    return main(["train", "-m", str(model), *NOISE, "-n", "2", *logs, *map(str, options)])


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def no_pipeline(*args, **kwargs):
    raise AssertionError("the whole model is loaded")


@pytest.fixture
def light(monkeypatch):
    """Loading a pipeline fails; returns the names of all tensors that are read."""
    read, get = [], Tensors.get
    monkeypatch.setattr("sd_hyena.models.load_pipeline", no_pipeline)
    monkeypatch.setattr(Tensors, "get", lambda self, name: read.append(name) or get(self, name))
    return read


@pytest.fixture(scope="module")
def models(tmp_path_factory, demo_pipe):
    """The bundled model in the ways models come."""
    root = tmp_path_factory.mktemp("models")
    export(demo_pipe, root / "one.safetensors")
    tensors = load_file(root / "one.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, root / "one.ckpt")
    weights = load_file(DEMO_DIR / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(weights)
    parts = {f"diffusion_pytorch_model-{n + 1:05d}-of-00002.safetensors": names[n::2] for n in range(2)}
    for kind in ("bin", "variant", "sharded"):
        unet = root / kind / "unet"
        unet.mkdir(parents=True)
        (unet / "config.json").symlink_to(DEMO_DIR / "unet" / "config.json")
        for path in DEMO_DIR.iterdir():
            if path.name != "unet":
                (root / kind / path.name).symlink_to(path)
    torch.save(weights, root / "bin" / "unet" / "diffusion_pytorch_model.bin")
    save_file(weights, root / "variant" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, root / "sharded" / "unet" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (root / "sharded" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def from_the_whole_model(tmp_path_factory):
    """What a run that also measures on pictures, so with everything loaded, learns from the same noise."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = shlex.split("--measure_on teacher --n_held_out 2 --draw_steps 2")
    assert train("demo", out, *options) == 0
    return out / "Hyena-00002.safetensors"


@pytest.mark.compatibility("Models", "train --data noise", "reads the chosen layers' tensors and no others")
@pytest.mark.parametrize("kind", ["demo", "one.safetensors", "one.ckpt", "bin", "variant", "sharded"])
def test_only_self_attention_is_read_and_the_result_is_the_whole_models(
    tmp_path, models, light, from_the_whole_model, kind
):
    out = tmp_path / "out"
    assert train("demo" if kind == "demo" else models / kind, out) == 0
    assert len(light) < 200
    assert all(".attn1." in name for name in light)
    assert same_weights(out / "Hyena-00002.safetensors", from_the_whole_model)
    files = [checkpoint.load(path) for path in (out / "Hyena-00002.safetensors", from_the_whole_model)]
    assert files[0].teacher == files[1].teacher


def test_everything_that_shows_figures_says_they_are_on_noise(tmp_path, capsys, light, from_the_whole_model):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    assert train("demo", out) == 0
    printed = capsys.readouterr().out
    assert printed.count("no pictures") == 1
    assert "relative error on noise up to" in printed
    assert "results on held-out noise after 2 steps" in printed
    file = out / "Hyena-00002.safetensors"
    assert checkpoint.load(file).training["measure_on"] == "noise"
    (folder,) = {p.parent for p in (tmp_path / "logs").rglob("events.out.tfevents*") if p.parent.parent.name == "logs"}
    tags = EventAccumulator(str(folder)).Reload().Tags()
    assert not tags["images"]
    layers = ("IN01", "M00")
    kinds = ("loss_on_noise", "relative_error_on_noise", "held_out_error_on_noise")
    assert set(tags["scalars"]) == {"loss", "lr"} | {f"{kind}/{layer}" for kind in kinds for layer in layers}
    assert main(["info", str(file)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "error on" in printed
    assert "measure_on=noise" in printed
    assert "attention_sample" not in printed
    whole = checkpoint.load(from_the_whole_model)
    assert whole.training["measure_on"] == "teacher"
    assert whole.layers["IN01"].figures != checkpoint.load(file).layers["IN01"].figures
    assert main(["info", str(from_the_whole_model)]) == 0
    printed = capsys.readouterr().out
    assert "held-out" in printed
    assert "on noise" not in " ".join(printed.split())


def test_a_data_folder_is_measured_on_unless_noise_is_asked_for(tmp_path, capsys, monkeypatch):
    data, options = tmp_path / "data", shlex.split("-n 2 --n_held_out 2 --draw_steps 1 -b 2")
    assert main(["prepare", "-m", "demo", "-o", str(data), "--sizes", "64x64,96x64", *options]) == 0
    capsys.readouterr()
    assert train("demo", tmp_path / "a", "--data_dir", data) == 0
    assert "held-out results after 2 steps" in capsys.readouterr().out
    monkeypatch.setattr("sd_hyena.models.load_pipeline", no_pipeline)
    assert train("demo", tmp_path / "b", "--data_dir", data, "--measure_on", "noise") == 0
    assert "results on held-out noise after 2 steps" in capsys.readouterr().out
    assert same_weights(*(tmp_path / name / "Hyena-00002.safetensors" for name in "ab"))


def test_teacher_data_may_be_measured_on_noise(tmp_path, capsys):
    options = shlex.split("--data teacher --measure_on noise --n_images 2 --n_held_out 2 --draw_steps 1")
    assert train("demo", tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "results on held-out noise" in printed
    assert "relative error on noise" not in printed  # what was trained on is not


def test_stage_2_after_noise_loads_everything_and_is_measured_on_pictures(tmp_path, capsys):
    options = shlex.split("--finetune_steps 1 --n_images 2 --n_held_out 2 --draw_steps 1")
    assert train("demo", tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "loading demo" in printed
    assert "relative error on noise" in printed
    assert "held-out results after 3 steps" in printed
    assert checkpoint.load(tmp_path / "out" / "Hyena-00003.safetensors").training["measure_on"] == "teacher"


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, light, monkeypatch, capsys):
    from sd_hyena.distill.logbook import Logbook

    options = ("-n", 6, "-s", 2, "--reuse", 2, "--sizes", "64x64,96x64")
    assert train("demo", tmp_path / "straight", *options) == 0
    scalars = Logbook.scalars

    def stop(self, progress):
        if progress.step == 5:
            raise KeyboardInterrupt
        scalars(self, progress)

    monkeypatch.setattr(Logbook, "scalars", stop)
    out = tmp_path / "out"
    assert train("demo", out, *options) == 130
    assert not (out / "Hyena-00006.safetensors").exists()
    monkeypatch.setattr(Logbook, "scalars", scalars)
    assert train("demo", out, *options, "--resume") == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert same_weights(out / "Hyena-00006.safetensors", tmp_path / "straight" / "Hyena-00006.safetensors")


def test_another_teachers_run_is_not_resumed(tmp_path, models, light, capsys):
    out, file = tmp_path / "out", tmp_path / "model.safetensors"
    shutil.copy(models / "one.safetensors", file)
    assert train(file, out) == 0
    tensors = load_file(file)
    tensors = {name: 1.1 * tensor if ".attn1.to_q." in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    assert train(file, out, "--resume") == 2
    assert "teacher was" in capsys.readouterr().err


def test_pretrained_weights_start_a_run(tmp_path, light):
    first = tmp_path / "first"
    assert train("demo", first, "--near", 5) == 0
    weights = first / "Hyena-00002.safetensors"
    assert train("demo", tmp_path / "second", "-r", "1e-9", "-p", weights) == 0
    file = checkpoint.load(tmp_path / "second" / "Hyena-00002.safetensors")
    before = checkpoint.load(weights)
    assert file.layers["M00"].config.near == 5
    for key, value in file.tensors["M00"].items():
        torch.testing.assert_close(value, before.tensors["M00"][key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["projections", "random"])
@pytest.mark.parametrize("form", ["full", "core"])
def test_the_teachers_start_is_fitted_to_noise(tmp_path, light, init, form):
    errors = {}
    for start in ("teacher", init):
        assert train("demo", tmp_path / start, "-n", 1, "-t", "high", "--init", start, "--form", form) == 0
        layers = checkpoint.load(tmp_path / start / "Hyena-00001.safetensors").layers
        errors[start] = sum(layer.figures["relative_error"] for layer in layers.values())
    assert errors["teacher"] < 0.85 * errors[init]


@pytest.mark.nightly
def test_two_processes_teach_the_same_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sd_hyena.distill.trainer.VALIDATION_SAMPLES", 64)  # as in the processes
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sd_hyena"]
    constant = shlex.split("-n 4 -t IN01,IN04 --lr_scheduler constant --lr_warmup_steps 0")
    assert train("demo", tmp_path / "one", *constant) == 0
    logs = ["-l", str(tmp_path / "logs"), "-o", str(tmp_path / "two")]
    command = [sys.executable, *launch, "train", "-m", "demo", *NOISE, *constant, "-b", "4", *logs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("no pictures") == 1
    one, two = (checkpoint.load(tmp_path / name / "Hyena-00004.safetensors") for name in ("one", "two"))
    for name, layer in one.layers.items():
        assert two.layers[name].figures == pytest.approx(layer.figures, rel=1e-3)


def test_a_hub_id_in_the_cache_is_read_like_a_folder(tmp_path, light, from_the_whole_model, monkeypatch):
    repository, revision = tmp_path / "cache" / "models--owner--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(DEMO_DIR)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert train("owner/model", out) == 0
    assert same_weights(out / "Hyena-00002.safetensors", from_the_whole_model)


def test_a_model_whose_layers_cannot_be_told_is_loaded_with_one_line(tmp_path, demo_pipe, monkeypatch, caplog, capsys):
    monkeypatch.setattr("sd_hyena.models.load_pipeline", lambda *args: demo_pipe)
    assert train("owner/model", tmp_path / "out") == 0
    (line,) = [m for m in caplog.messages if "owner/model" in m]
    assert "not in the cache" in line
    assert "results on held-out noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("input_blocks.1.1", lambda t: None, "holds no tensor model.diffusion_model.input_blocks.1.1"),
        (
            "input_blocks.1.1",
            lambda t: t[:, :-1].contiguous(),
            "1.1.transformer_blocks.0.attn1.to_q.weight has shape (64, 63), expected (64, 64)",
        ),
        (
            "middle_block.1",
            lambda t: t.fill_(float("nan")),
            "middle_block.1.transformer_blocks.0.attn1.to_q.weight holds NaN or infinite values",
        ),
        ("output_blocks.3.1", lambda t: None, "holds no tensor model.diffusion_model.output_blocks.3.1"),
    ],
)
def test_a_layer_that_cannot_be_used_is_named_in_one_line(tmp_path, models, light, capsys, key, change, message):
    tensors = load_file(models / "one.safetensors")
    name = f"model.diffusion_model.{key}.transformer_blocks.0.attn1.to_q.weight"
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, tmp_path / "model.safetensors")
    assert train(tmp_path / "model.safetensors", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_options_of_pictures_are_ignored_with_a_line(caplog):
    options = shlex.split("-m demo --data noise --n_images 5 --unconditional 0 --print_config")
    assert main(["train", *options]) == 0
    (line,) = caplog.messages
    assert line.startswith("--n_images, --unconditional: ignored, being of pictures")
