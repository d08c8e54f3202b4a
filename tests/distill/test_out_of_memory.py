"""Training and preparing go on in smaller batches when memory runs out, with the same result."""

import shlex

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from out_of_memory import fail
from safetensors.torch import load_file

from sd_hyena import checkpoint
from sd_hyena.cli import main
from sd_hyena.distill import trainer
from sd_hyena.distill.joint import StudentUNet
from sd_hyena.distill.logbook import Logbook
from sd_hyena.distill.plan import plan_drawings
from sd_hyena.distill.prepare import prepare
from sd_hyena.distill.prepare_settings import PrepareSettings
from sd_hyena.distill.shards import shard_name
from sd_hyena.distill.students import Students
from sd_hyena.errors import OutOfMemory
from sd_hyena.fingerprint import fingerprint
from sd_hyena.generate.samplers import with_usable_scheduler
from sd_hyena.models import load_pipeline, locate
from sd_hyena.nn.states import States

SMALL = shlex.split(
    "-t IN04 -W 64 -H 64 -b 3 --gradient_accumulation_steps 2 -n 2 -s 1 -r 1e-3 -d 3 --lr_warmup_steps 0 "
    "--reuse 2 --n_images 6 --n_held_out 4 --draw_steps 2"
)


def train(folder, model, *options):
    return main(["train", "-m", str(model), *SMALL, "-o", str(folder), "-l", str(folder.parent / "logs"), *options])


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "VALIDATION_SAMPLES", 8)
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(Logbook, "pictures", lambda self, step, students: None)


@pytest.fixture(scope="module")
def model(_folders):
    return _folders("sd15")


@pytest.fixture(scope="module")
def unhurried(model, tmp_path_factory, _quick):
    """A run's folder, and the gradients of its updates."""
    folder = tmp_path_factory.mktemp("unhurried")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Logbook, "pictures", lambda self, step, students: None)
        gradients = recorded(monkeypatch)
        assert train(folder, model, "--finetune_steps", "1") == 0
    return folder, gradients


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def recorded(monkeypatch):
    """The gradients of all updates. Adam makes as much of those that are rounding alone, so weights tell less."""
    step, gradients = torch.optim.AdamW.step, []

    def record(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return gradients


def size_of(number, students, records):
    return len(next(iter(records.values())).x)


@pytest.mark.reliability(14)
def test_micro_batches_halve_and_the_result_stays(tmp_path, model, unhurried, monkeypatch, caplog):
    """Odd batches too, gradients half computed, both stages, measuring, and the passes that the start is fitted to."""
    (folder, wanted), gradients = unhurried, recorded(monkeypatch)
    fail(monkeypatch, Students, "forward", lambda *call: size_of(*call) > 2)
    passes = fail(monkeypatch, UNet2DConditionModel, "forward", lambda n, *_, **__: n == 0)
    backward = fail(monkeypatch, Accelerator, "backward", lambda n, *_: n == 2, "gpu", after=True)
    fail(monkeypatch, StudentUNet, "forward", lambda n, model, inputs: len(inputs["sample"]) > 1, "gpu")
    assert train(tmp_path, model, "--finetune_steps", "1") == 0
    assert passes[0]
    assert len(backward) == 3 + 6 + 6 + 6  # cut off; two updates of stage 1; one of stage 2
    lines = "\n".join(caplog.messages)
    for line in (
        "in the teacher's passes: 2 at a time from here",
        "at step 1: micro-batches of 2 x 4 instead of 3 x 2 from here; the effective batch stays 6",
        "at step 1: micro-batches of 1 x 6 instead of 2 x 4 from here; the effective batch stays 6",
        "while measuring: 2 at a time from here",
        "at step 3: micro-batches of 2 x 4 instead of 3 x 2 from here; the effective batch stays 6",
        "at step 3: micro-batches of 1 x 6 instead of 2 x 4 from here; the effective batch stays 6",
    ):
        assert lines.count(f"out of memory {line}") == 1
    assert len(gradients) == 3
    for plain, hurried in zip(wanted, gradients, strict=True):
        assert (plain - hurried).norm() < 1e-4 * plain.norm()
    for plain, hurried in zip(files(folder), files(tmp_path), strict=True):
        one, other = checkpoint.load(plain), checkpoint.load(hurried)
        assert "micro_batch_size" not in one.training
        assert other.training["micro_batch_size"] == 1
        assert other.training["batch_size"] == 3
        for name, layer in other.layers.items():
            assert layer.figures == pytest.approx(one.layers[name].figures, rel=1e-3)


@pytest.mark.reliability(9, 14)
def test_a_run_that_ran_short_resumes_bit_for_bit(tmp_path, monkeypatch, caplog):
    options = ("demo", "--data", "noise", "-n", "4", "--lr_scheduler", "cosine")
    fail(monkeypatch, Students, "forward", lambda *call: size_of(*call) > 2)
    assert train(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patched:
        scalars = Logbook.scalars

        def killed(self, progress):
            if progress.step == 3:
                raise KeyboardInterrupt
            scalars(self, progress)

        patched.setattr(Logbook, "scalars", killed)
        assert train(tmp_path / "cut", *options) == 130
    assert "micro-batches of 2 x 4" in caplog.text
    caplog.clear()
    assert train(tmp_path / "cut", *options, "--resume") == 0
    assert "micro-batches" not in caplog.text  # it knows
    for whole, cut in zip(files(tmp_path / "whole"), files(tmp_path / "cut"), strict=True):
        whole, cut = load_file(whole), load_file(cut)
        assert all(torch.equal(whole[name], cut[name]) for name in whole.keys() | cut.keys())


@pytest.mark.reliability(14)
@pytest.mark.parametrize(
    ("owner", "name", "saved", "reason"),
    [
        (
            Students,
            "forward",
            1,
            "an update, one at a time: lower --sizes, or --reuse, or teach fewer layers at once",
        ),
        (torch.optim.AdamW, "step", 0, "the optimiser at step 1: teach fewer layers at once with --target"),
        (States, "start_from", 0, "fitting the start: use --init projections"),
    ],
)
def test_where_nothing_helps_one_line_says_what_to_lower(tmp_path, monkeypatch, capsys, owner, name, saved, reason):
    calls = fail(monkeypatch, owner, name, lambda n, *_, **__: n >= 2 * saved)
    assert train(tmp_path, "demo", "--data", "noise", "--sizes", "64x64") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sd-hyena: out of memory")
    assert reason in error
    assert len(files(tmp_path)) == saved
    if saved:
        assert error.endswith(f"the last good file is {files(tmp_path)[0]}")
        assert len(calls) == 2 + 3  # batches of 3, 2 and 1


@pytest.fixture(scope="module")
def pipe(model):
    made = with_usable_scheduler(load_pipeline(locate(str(model))))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.reliability(14)
def test_no_pictures_in_the_log_are_no_reason_to_lose_a_run(pipe, monkeypatch, caplog):
    monkeypatch.undo()
    processors = dict(pipe.unet.attn_processors)
    with monkeypatch.context() as patched:
        fail(patched, pipe.vae, "decode", kind="gpu")
        Logbook(Accelerator(cpu=True), pipe, ["a fox", "a house"], (128, 128), 1).pictures(7, Students({}, {}))
    assert caplog.messages[-1] == "no pictures in the log at step 7: out of memory"
    assert not any("main memory" in line for line in caplog.messages)  # training needs the UNet where it is
    assert pipe.unet.attn_processors == processors
    assert not pipe.vae.use_tiling


@pytest.mark.reliability(14)
def test_prepared_pictures_stay_the_same(tmp_path, pipe, monkeypatch, caplog):
    """But for the rounding that the size of a batch makes in matrix products."""
    settings = PrepareSettings("thin", sizes="64x64", n_images=4, n_held_out=1, draw_steps=1)
    plan = plan_drawings(settings, pipe, fingerprint(pipe), ["a fox", "a house"])
    prepare(plan, tmp_path / "plain", pipe, 5)
    fail(monkeypatch, pipe.unet, "forward", lambda n, x, *_, **__: len(x) > 4, "gpu")
    counts = []
    prepare(plan, tmp_path / "hurried", pipe, 5, on_progress=lambda done, total: counts.append(done))
    lines = [line for line in caplog.messages if "memory" in line]
    assert lines == [f"out of memory while making pictures: {n} at a time from here" for n in (3, 2)]
    assert counts == [0, 2, 4, 5, 5]
    plain, hurried = (load_file(tmp_path / name / shard_name(0)) for name in ("plain", "hurried"))
    assert plain.keys() == hurried.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(hurried[name], tensor, rtol=1e-3, atol=1e-3)
    fail(monkeypatch, pipe.unet, "forward")
    with pytest.raises(OutOfMemory, match="while making pictures, one at a time: lower --width and --height"):
        prepare(plan, tmp_path / "none", pipe, 5)
