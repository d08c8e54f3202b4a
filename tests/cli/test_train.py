"""``sd-hyena train`` as a user types it, on the bundled model at 64 px."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd_hyena import checkpoint, load_hyena
from sd_hyena.cli import main

SMALL = shlex.split("-m demo -W 64 -H 64 -b 2 -r 1e-3 -d 3 --n_images 6 --n_held_out 4 --draw_steps 2")


def train(folder, *options):
    return main(["train", *SMALL, "-o", str(folder), "-l", str(folder.parent / "logs"), *map(str, options)])


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.reliability(11)
def test_training_several_layers_writes_one_file_with_figures(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out, "-t", "IN01,out11", "-n", 6, "-s", 4) == 0
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["Hyena-00004.safetensors", "Hyena-00006.safetensors"]
    file = checkpoint.load(out / "Hyena-00006.safetensors")
    assert list(file.layers) == ["IN01", "OUT11"]
    assert file.training["step"] == 6
    state = torch.load(out / ".train-state.pt", weights_only=True)
    assert state["step"] == 6
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {6}  # updates that were made
    assert file.training["seed"] == 3
    assert file.teacher["widths"] == "64-96-128-128"
    assert 0 < file.layers["IN01"].figures["relative_error"] < 1
    printed = capsys.readouterr().out
    for text in ("relative error", "OUT11", "mean", "Hyena-00006.safetensors"):
        assert text in printed
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path / "out", "-n", 3, "-s", 0) == 0
    (folder,) = {p.parent for p in (tmp_path / "logs").rglob("events.out.tfevents*") if p.parent.parent.name == "logs"}
    events = EventAccumulator(str(folder)).Reload()
    assert {"loss", "lr", "loss/IN01", "relative_error/IN01"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert events.Tags()["images"] == ["teacher above student"]


def test_one_file_each_with_the_layer_in_its_name(tmp_path):
    out = tmp_path / "out"
    assert train(out, "-t", "high", "-n", 1, "-f", "{t}-{s:03d}") == 0
    assert sorted(p.stem for p in out.glob("*.safetensors")) == [
        f"{t}-001" for t in ("IN01", "IN02", "OUT09", "OUT10", "OUT11")
    ]
    assert list(checkpoint.load(out / "OUT10-001.safetensors").layers) == ["OUT10"]


@pytest.mark.parametrize(
    "options",
    [
        "--operator causal --init random --data noise --hyena_order 3 --hyena_num_blocks 2",
        "--operator causal --hyena-num-heads 2",
        "--form core --feature-map exp",
        "--near 5 --block 2 --scaling extend --branch_dropout 0.5",
        "--operator near --near 7",
        "--operator long --hyena_filter_order 16 --hyena_short_filter_order 5",
        "--operator windows --block 3",
        "--init random --scaling stretch --lr_scheduler constant --max_grad_norm 0",
        "--mixed_precision bf16 --gradient_accumulation_steps 2 --lr_warmup_steps 1",
        "--operator linear --feature_map elu",
        "--near 0 --block 0 --reuse 2 --init projections -r 0",
        "--finetune_steps 1 -n 1 --feature_weight 1 --ema_decay 0 --finetune_lr 1e-4",
        "--finetune_steps 2 -n 0 --gradient_checkpointing --finetune_batch_size 3 --form core",
        "--finetune_steps 1 -n 1 --mixed_precision bf16 --prediction_weight 0.5 --feature_weight 0",
    ],
)
def test_every_option_trains_a_file_that_draws(tmp_path, pipe, options):
    out = tmp_path / "out"
    assert train(out, "-t", "IN04", "-n", 2, "-s", 0, *options.split()) == 0
    drawn = []
    for file in (None, out / "Hyena-00002.safetensors"):
        if file:
            load_hyena(pipe, file)
        draw = torch.Generator().manual_seed(0)
        drawn.append(pipe("a fox", 64, 64, 2, generator=draw, output_type="latent").images)
    assert drawn[1].isfinite().all()
    assert not torch.equal(*drawn)


def test_training_lowers_the_error(tmp_path):
    out = tmp_path / "out"
    assert train(out, "-t", "IN01", "-n", 1, "-s", 0, "--init", "random") == 0
    assert train(tmp_path / "longer", "-t", "IN01", "-n", 60, "-s", 0, "--init", "random") == 0
    first, later = (
        checkpoint.load(p).layers["IN01"].figures["relative_error"]
        for p in (out / "Hyena-00001.safetensors", tmp_path / "longer" / "Hyena-00060.safetensors")
    )
    assert later < 0.7 * first


def test_a_run_that_makes_things_worse_says_so(tmp_path, caplog):
    assert train(tmp_path / "a", "-t", "IN01", "-n", 3, "-s", 0, "-r", 0.5, "--lr_warmup_steps", 0) == 0
    (said,) = (message for message in caplog.messages if "larger" in message)
    assert said.startswith("training has made the error larger (IN01 0.")
    assert "lower --lr" in said
    caplog.clear()
    assert train(tmp_path / "b", "-t", "IN01", "-n", 3, "-s", 0) == 0
    assert "larger" not in caplog.text


def test_the_teacher_start_beats_a_random_one(tmp_path):
    errors = {}
    for start in ("teacher", "random"):
        assert train(tmp_path / start, "-t", "high", "-n", 1, "-s", 0, "--init", start) == 0
        layers = checkpoint.load(tmp_path / start / "Hyena-00001.safetensors").layers
        errors[start] = sum(layer.figures["relative_error"] for layer in layers.values())
    assert errors["teacher"] < errors["random"] / 2


def test_pretrained_weights_start_a_run(tmp_path):
    first = tmp_path / "first"
    assert train(first, "-t", "IN01,IN02", "-n", 3, "-s", 0, "--near", 5) == 0
    weights = first / "Hyena-00003.safetensors"
    assert train(tmp_path / "second", "-t", "IN02", "-n", 1, "-s", 0, "-r", "1e-9", "-p", weights) == 0
    file = checkpoint.load(tmp_path / "second" / "Hyena-00001.safetensors")
    assert file.layers["IN02"].config.near == 5
    before = checkpoint.load(weights).tensors["IN02"]
    for key, value in file.tensors["IN02"].items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)
    assert train(tmp_path / "third", "-t", "OUT11", "-n", 1, "-p", weights) == 2


def test_recipe_flags_and_print_config(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('teacher_model = "demo"\ntarget = "IN02"\nlr = 0.5\nn_steps = 7\n')
    assert main(["train", "--config", str(recipe), "-n", "9", "--print-config"]) == 0
    printed = capsys.readouterr().out
    for line in ('target = "IN02"', "lr = 0.5", "n_steps = 9", "width = 256", "batch_size = 16"):
        assert line in printed.splitlines()
    again = tmp_path / "again.toml"
    again.write_text(printed)
    assert main(["train", "--config", str(again), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    recipe.write_text("learning_rate = 1\n")
    assert main(["train", "--config", str(recipe), "-m", "demo"]) == 2
    assert "'learning_rate' is not a setting" in capsys.readouterr().err


def test_defaults_are_the_documented_ones(capsys):
    assert main(["train", "-m", "owner/model", "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        'target = "IN01"',
        "batch_size = 16",
        "lr = 0.0",
        "n_steps = 200",
        "width = 512",
        "height = 512",
        "save_every_n_steps = 40",
        'log_dir = "logs"',
        'out_dir = "out"',
        'name_format = "Hyena-{s:05d}"',
        "seed = -1",
        "hyena_order = 2",
        "hyena_filter_order = 64",
        "hyena_num_blocks = 1",
        "hyena_num_heads = 1",
        "hyena_short_filter_order = 3",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("-m no-such -t IN03", 2, "model no-such not found"),
        ("-m demo -t IN03", 2, "no self-attention layer IN03"),
        ("-m demo -t IN91", 2, "no self-attention layer IN91"),
        ("-m demo -W 0", 2, "--width is 0"),
        ("-m demo -H 100", 2, "height 100 px: model demo needs a positive multiple of 8, such as 96"),
        ("-m demo -f ../{s}", 2, "must not leave the output folder"),
        ("-m demo -f {s.__class__}", 2, "is not one of them"),
        ("-m demo -f {s:>999999999}", 2, "is not a format it takes"),
        ("-m demo -n 0", 2, "--n_steps is 0"),
        ("-m demo -r -1", 2, "--lr is -1"),
        ("-m demo --reuse 0", 2, "--reuse is 0"),
        ("-m demo --finetune_steps -3", 2, "--finetune_steps is -3"),
        ("-m demo --ema_decay 1", 2, "--ema_decay is 1"),
        ("-m demo --finetune_steps 3 --prediction_weight 0 --feature_weight 0", 2, "needs a loss"),
        ("-m demo --recipe quick --config x.toml", 2, "choose one"),
        ("-m demo -b -1", 2, "--batch_size is -1"),
        ("-m demo --prompts nothing.txt", 2, "prompts file nothing.txt"),
        ("-m demo -p nothing.safetensors", 2, "--pretrained_weight is nothing.safetensors"),
        ("-m demo --device cuda", 2, "no usable CUDA device"),
        ("-m demo --device gpu9", 2, "'gpu9'"),
        ("-m demo --operator causal --form core", 2, "form must be full"),
        ("-m demo --hyena_order 1", 2, "order"),
        ("-m demo --operator causal --hyena_num_heads 3", 2, "cannot be split into 3 heads"),
        ("-m demo --operator long --hyena_short_filter_order 2", 2, "must be odd"),
        ("-m demo --near 4", 2, "near must be odd"),
    ],
)
def test_bad_requests_print_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, options, status, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options.split()]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_operator_is_a_usage_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "-m", "demo", "--operator", "hyena9"])
    assert stop.value.code == 2
    assert "hyena9" in capsys.readouterr().err
    recipe = tmp_path / "r.toml"
    recipe.write_text('teacher_model = "demo"\noperator = "hyena9"\n')
    assert main(["train", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "operator = 'hyena9' s" in error
    assert error.count("\n") == 1


def test_options_that_the_operator_does_not_take_are_warned_of_in_one_line(caplog):
    options = ["--operator", "causal", "--near", "5", "--block", "4", "--hyena_order", "3"]
    assert main(["train", "-m", "demo", *options, "--print_config"]) == 0
    assert [r.message for r in caplog.records] == ["--near, --block: ignored, being not for the causal operator"]


def test_finished_runs_are_not_overwritten(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out, "-n", 1) == 0
    before = (out / "Hyena-00001.safetensors").read_bytes()
    assert train(out, "-n", 1, "-d", 4) == 2
    assert "holds a training run" in capsys.readouterr().err
    assert (out / "Hyena-00001.safetensors").read_bytes() == before
    assert train(out, "-n", 1, "-d", 4, "--overwrite") == 0
    assert (out / "Hyena-00001.safetensors").read_bytes() != before


def test_resuming_with_other_settings_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out, "-n", 2) == 0
    assert train(out, "-n", 2, "--near", 5, "--resume") == 2
    assert "near was 3, is 5" in capsys.readouterr().err


def start(folder, *options):
    logs = str(folder.parent / "logs")
    command = [sys.executable, "-m", "sd_hyena", "train", *SMALL, "-o", str(folder), "-l", logs, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def wait_for(path: Path, process):
    until = time.time() + 120
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < until
        time.sleep(0.01)


LONG = ("-t", "IN01,M00", "-n", "28", "-s", "7")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    assert train(out, *LONG) == 0
    return out / "Hyena-00028.safetensors"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.nightly),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, capsys, uninterrupted, number, status):
    out = tmp_path / "out"
    process = start(out, *LONG)
    wait_for(out / "Hyena-00007.safetensors", process)
    process.send_signal(number)
    assert process.wait(60) == status, process.stdout.read()
    assert not (out / "Hyena-00028.safetensors").exists()
    for file in out.glob("Hyena-*.safetensors"):
        checkpoint.load(file)
    assert train(out, *LONG, "--resume") == 0
    assert "resuming at step" in capsys.readouterr().out
    assert same_weights(out / "Hyena-00028.safetensors", uninterrupted)
    assert {p.name for p in out.glob(".*")} == {".sd-hyena-lock", ".train-state.pt"}


BOTH = ("-t", "IN01,M00", "-n", "3", "--finetune_steps", "12", "-s", "3", "--reuse", "2")


@pytest.mark.parametrize("kill_at", [pytest.param(3, marks=pytest.mark.nightly), 6])
def test_a_run_killed_at_the_end_of_stage_1_or_in_stage_2_resumes_bit_for_bit(tmp_path, capsys, both_stages, kill_at):
    out = tmp_path / "out"
    process = start(out, *BOTH)
    wait_for(out / f"Hyena-{kill_at:05d}.safetensors", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -9
    assert not (out / "Hyena-00015.safetensors").exists()
    assert train(out, *BOTH, "--resume") == 0
    assert "resuming at step" in capsys.readouterr().out
    assert same_weights(out / "Hyena-00015.safetensors", both_stages / "Hyena-00015.safetensors")


BRIEF = ("-n", 2, "--finetune_steps", 1)


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    out = tmp_path_factory.mktemp("brief") / "out"
    assert train(out, *BRIEF) == 0
    return out


@pytest.mark.parametrize("moment", ["as the last step of stage 1 is saved", "before the first step of stage 2"])
def test_a_run_asked_to_stop_between_the_stages_keeps_the_figures_of_the_first(tmp_path, brief, monkeypatch, moment):
    from sd_hyena import interrupts
    from sd_hyena.distill import trainer

    deferred, save_state, passed = interrupts.deferred, trainer.save_state, []

    def passing(which):
        passed.append(which)
        if passed.count(which) == 2 and moment == which:
            signal.raise_signal(signal.SIGTERM)

    def saving(folder, state):
        if state["step"] in (0, 2):
            passing("as the last step of stage 1 is saved")
        save_state(folder, state)

    @contextlib.contextmanager
    def entering(what):
        with deferred(what) as asked:
            passing("before the first step of stage 2")
            yield asked

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_state", saving)
        patched.setattr(interrupts, "deferred", entering)
        assert train(tmp_path / "out", *BRIEF) == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "Hyena-00003.safetensors").exists()
    assert train(tmp_path / "out", *BRIEF, "--resume") == 0
    for name in ("Hyena-00002.safetensors", "Hyena-00003.safetensors"):
        assert same_weights(tmp_path / "out" / name, brief / name)
        layers = checkpoint.load(brief / name).layers
        assert layers["IN01"].figures
        assert checkpoint.load(tmp_path / "out" / name).layers == layers


def test_a_resumed_run_asked_to_stop_at_once_has_nothing_new_to_save(tmp_path, capsys, monkeypatch):
    from sd_hyena.distill import trainer

    assert train(tmp_path / "out", "-n", 1) == 0
    before = (tmp_path / "out" / "Hyena-00001.safetensors").read_bytes()
    monkeypatch.setattr(trainer.interrupts, "asked", lambda: signal.SIGTERM)
    assert train(tmp_path / "out", "-n", 1, "--resume") == 143
    assert "stopped at step 1; nothing new to save; go on with --resume" in capsys.readouterr().out
    assert (tmp_path / "out" / "Hyena-00001.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def both_stages(tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "out"
    assert train(out, *BOTH) == 0
    return out


def test_stage_2_writes_its_terms_and_the_moving_average(both_stages):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = both_stages.parent / "logs"
    (folder,) = {p.parent for p in logs.rglob("events.out.tfevents*") if p.parent.parent.name == "logs"}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"joint/prediction", "joint/feature"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("joint/feature")] == list(range(4, 16))
    assert len(events.Images("teacher above student")) == 5  # after 3, 6, 9, 12 and 15 steps
    weights = load_file(both_stages / "Hyena-00015.safetensors")
    state = torch.load(both_stages / ".train-state.pt", weights_only=True)
    name = "in_proj.weight"
    live = state["students"][f"operators.0.{name}"]
    assert not torch.equal(weights[f"layers.IN01.{name}"], live)  # what is saved is the average, not the last step
    assert (weights[f"layers.IN01.{name}"] - live).abs().max() < 0.1


@pytest.mark.parametrize("recipe", ["quick", "standard", "best"])
def test_recipes_fill_what_no_flag_says(recipe, capsys):
    assert main(["train", "-m", "demo", "--recipe", recipe, "-n", "5", "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "n_steps = 5" in lines
    assert "reuse = 4" in lines
    assert f'target = "{"all" if recipe == "best" else "high"}"' in lines


def test_two_runs_on_one_folder(tmp_path, capsys):
    from sd_hyena.files import locked

    with locked(tmp_path / "out"):
        assert train(tmp_path / "out", "-n", 1) == 2
    assert "in use by another run" in capsys.readouterr().err


@pytest.mark.reliability(8, 9)
def test_a_run_that_starts_over_is_not_resumed_as_the_old_one(tmp_path, capsys, monkeypatch):
    from sd_hyena.distill.students import Students

    out = tmp_path / "out"
    assert train(out, "-n", 1) == 0
    file = out / "Hyena-00001.safetensors"
    old = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Students, "forward", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(out, "-n", 1, "--overwrite") == 130
    assert file.read_bytes() == old
    assert train(out, "-n", 1, "--resume") == 0
    assert "resuming at step 0" in capsys.readouterr().out
    assert file.stat().st_size == len(old)
    checkpoint.load(file)


@pytest.mark.reliability(7)
def test_a_log_that_cannot_be_written_is_no_reason_to_lose_a_run(tmp_path, caplog, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def full(self, data):
        if b"relative_error/" in data:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    assert train(tmp_path / "out", "-n", 4) == 0
    assert [m for m in caplog.messages if "without a log" in m] == [
        f"{tmp_path / 'logs'}: cannot write: No space left on device: the run goes on without a log"
    ]
    checkpoint.load(tmp_path / "out" / "Hyena-00004.safetensors")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    from sd_hyena.distill.students import Students

    forward, calls = Students.forward, []

    def breaks(self, records):
        calls.append(1)
        return {k: y * (float("nan") if len(calls) > 4 else 1) for k, y in forward(self, records).items()}

    monkeypatch.setattr(Students, "forward", breaks)
    out = tmp_path / "out"
    assert train(out, "-n", 30, "-s", 2) == 1
    error = capsys.readouterr().err
    assert "the loss of IN01 is not finite at step 5 (seed 3)" in error
    assert "the last good file is" in error
    assert sorted(p.stem for p in out.glob("*.safetensors")) == ["Hyena-00002", "Hyena-00004"]
    for file in out.glob("*.safetensors"):
        checkpoint.load(file)


SHARED = """
import os, sys
import pytest
from out_of_memory import fail
from sd_hyena.cli import main
from sd_hyena.distill import trainer
from sd_hyena.distill.students import Students

trainer.VALIDATION_SAMPLES = 8
if os.environ["RANK"] == "1":  # has room for one picture at a time
    room = lambda number, self, records: len(next(iter(records.values())).x) > 1
    fail(pytest.MonkeyPatch(), Students, "forward", room)
with open(f"pid{os.environ['RANK']}", "w") as file:
    file.write(str(os.getpid()))
for command in open("commands").read().splitlines():
    status = main(command.split())
    if status:
        sys.exit(status)
"""
COMMANDS = (
    "prepare -m demo --sizes 64x64,72x64,64x72 -n 6 --n_held_out 3 --draw_steps 1 -b 2 -o prepared",
    "generate -m demo -W 64 -H 64 -p fox -y ,demo -n 2 -i 2 -s 1 -k 5 -f {{h}}-{{n}} --grid -o drawn",
    "train -m demo -W 64 -H 64 -t IN01,OUT10 -r 1e-3 -d 3 -n 6 -s 9 --n_images 6 --n_held_out 4 --draw_steps 2 "
    "--reuse 2 --lr_scheduler constant --lr_warmup_steps 0 --finetune_steps 16 -b {batch} -o trained -l logs",
)


def losses(output):
    return {int(line.split()[1].partition("/")[0]): line.split()[3] for line in output.splitlines() if " loss " in line}


@pytest.mark.reliability(6, 9)
def test_two_processes_do_the_same_as_one_and_end_together(tmp_path, monkeypatch, capfd):
    """The same shards and pictures, byte for byte; with half the batch each the same losses in both stages, until one
    of the two is killed: then the other ends with one line, and another number of processes does not go on."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, batch in ((one, 4), (two, 2)):
        folder.mkdir()
        (folder / "commands").write_text("\n".join(COMMANDS).format(batch=batch))
    (two / "run.py").write_text(SHARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), os.pathsep)
    process = subprocess.Popen(launch, cwd=two, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(two / "trained" / ".train-state.pt", process)  # of the first stage's end
    wait_for(two / "trained" / "Hyena-00009.safetensors", process)
    os.kill(int((two / "pid1").read_text()), signal.SIGKILL)
    started, output = time.time(), process.communicate(timeout=60)[0]
    assert time.time() - started < 20
    assert process.returncode == 1
    said = [line.removeprefix("sd-hyena: ") for line in output.splitlines() if line.startswith("sd-hyena:")]
    assert said[0] == (
        "out of memory at step 1: micro-batches of 1 x 2 instead of 2 x 1 from here; the effective batch stays 4"
    )
    assert [line for line in said if not line.startswith("out of memory")] == [
        "another process of this run has ended, and so does this one; what is written stays (train: --resume)"
    ]
    assert "gloo" not in output
    assert not (two / "trained" / "Hyena-00022.safetensors").exists()

    monkeypatch.chdir(one)
    assert [main(command.split()) for command in (one / "commands").read_text().splitlines()] == [0, 0, 0]
    files = [checkpoint.load(folder / "trained" / "Hyena-00006.safetensors") for folder in (one, two)]
    for expected, found in zip(*(file.layers.values() for file in files), strict=True):
        assert found.figures == pytest.approx(expected.figures, rel=1e-3)
    expected, found = losses(capfd.readouterr().out), losses(output)
    assert {1, 6, 7, 9} <= set(found)
    for step, loss in found.items():
        assert float(loss) == pytest.approx(float(expected[step]), rel=1e-2)
    for name, count in (("prepared", 3 + 1), ("drawn", 2 * 4 + 1)):
        contents = [
            {path.name: path.read_bytes() for path in (folder / name).rglob("*.*") if path.name[0] != "."}
            for folder in (one, two)
        ]
        assert contents[0] == contents[1]
        assert len(contents[0]) == count
    assert output.count("drawn/grid.png") == output.count("9 pictures in prepared") == 1

    monkeypatch.chdir(two)
    checkpoint.load(two / "trained" / "Hyena-00009.safetensors")
    assert main([*(two / "commands").read_text().splitlines()[-1].split(), "--resume"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "processes was 2, is 1" in error
