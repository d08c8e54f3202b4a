"""Training and preparing go on in smaller batches when memory runs out, with the same result."""

import shlex

import pytest
from accelerate import Accelerator
from out_of_memory import fail
from safetensors.torch import load_file

from sd_hyena.cli import main
from sd_hyena.distill.logbook import Logbook
from sd_hyena.distill.students import Students

SMALL = shlex.split(
    "-t IN04,M00 -W 64 -H 64 -b 3 --gradient_accumulation_steps 2 -n 2 -s 1 -r 1e-3 -d 3 --lr_warmup_steps 0 "
    "--reuse 2 --n_images 6 --n_held_out 4 --draw_steps 2"
)


def train(folder, model, *options):
    return main(["train", "-m", str(model), *SMALL, "-o", str(folder), "-l", str(folder.parent / "logs"), *options])


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(Logbook, "pictures", lambda self, step, students: None)


@pytest.fixture(scope="module")
def model(_folders):
    return _folders("sd15")


@pytest.fixture(scope="module")
def unhurried(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unhurried")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Logbook, "pictures", lambda self, step, students: None)
        assert train(folder, model, "--finetune_steps", "1") == 0
    return folder


def larger_than(size):
    """Of calls with records."""
    return lambda number, students, records: len(next(iter(records.values())).x) > size


def distance(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-3)).item() for k in a)


@pytest.mark.reliability(14)
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_micro_batches_halve_and_the_result_stays(tmp_path, model, unhurried, monkeypatch, caplog, kind):
    fail(monkeypatch, Students, "forward", larger_than(1), kind)
    fail(monkeypatch, Accelerator, "backward", lambda number, *args: number == 7, kind, after=True)
    assert train(tmp_path / "out", model, "--finetune_steps", "1") == 0
    print(caplog.text)
    print(
        [
            distance(unhurried / f"Hyena-{n:05d}.safetensors", tmp_path / "out" / f"Hyena-{n:05d}.safetensors")
            for n in (1, 2, 3)
        ]
    )
    assert 0
