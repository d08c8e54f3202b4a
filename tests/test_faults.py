"""The campaign's detectors fire on planted faults, and a sample of it ends in zeros."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import trained
from PIL import Image
from safetensors.torch import save_file

from faults import __main__ as campaign
from faults import child, hostile, hyena_files, meddle, network, page, pickles, tensor_files, trouble
from faults.judge import files_in, judge
from faults.report import Report
from faults.scene import COMMANDS, TELL_TIMES
from sd_hyena import checkpoint
from sd_hyena.config import OperatorConfig

GOOD = "sd-hyena: x.safetensors: is empty: download or copy it again\n"


@pytest.mark.parametrize(
    ("expected", "ending"),
    [
        ("", (1, "", GOOD, 0.1)),
        ("hang", (None, "", "", 30.0)),
        ("hang", (1, "", GOOD, 31.0)),
        ("exit status -11", (-11, "", "", 0.1)),
        ("silent", (1, "", "", 0.1)),
        ("unnamed", (1, "", "sd-hyena: something is wrong somewhere\n", 0.1)),
        ("raw words", (1, "", "Traceback (most recent call last):\n" + GOOD, 0.1)),
        ("raw words", (1, "", GOOD[:-1] + " (--debug shows where)\n", 0.1)),
        ("raw words", (1, "", GOOD[:-1] + " pass weights_only=False\n", 0.1)),
        ("raw line", (1, "", GOOD + "and a second line\n", 0.1)),
        ("control character", (1, "", GOOD[:-1] + "\x1b[31m\n", 0.1)),
        ("control character", (0, "layer \x9b31m\n", "", 0.1)),
        ("control character", (0, "layer \u202e\n", "", 0.1)),
        ("a message of", (1, "", GOOD[:-1] * 99 + "\n", 0.1)),
    ],
)
def test_endings_are_judged(expected, ending):
    assert judge(*ending, names=["x.safetensors"]).startswith(expected)
    assert bool(judge(*ending, names=["x.safetensors"])) == bool(expected)


def test_losses_are_seen(tmp_path):
    (tmp_path / "kept").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "state.pt").write_text("b")
    before = files_in(tmp_path)
    good = (0, "", "", 0.1, before)
    assert judge(*good, files_in(tmp_path)) == ""
    (tmp_path / "sub" / ".state.pt.x.tmp").write_text("half")
    assert judge(*good, files_in(tmp_path)) == "left behind: sub/.state.pt.x.tmp"
    assert judge(*good, files_in(tmp_path), stray=True) == ""
    (tmp_path / "kept").write_text("c")
    assert judge(*good, files_in(tmp_path)) == "overwritten: kept"
    assert judge(*good, files_in(tmp_path), writes=["kept"], stray=True) == ""
    (tmp_path / "kept").unlink()
    assert judge(*good, files_in(tmp_path), writes=["kept"]) == "lost: kept"


def test_a_part_that_fails_is_a_failure(monkeypatch, capsys):
    report = Report(7)
    report.verdict((1, 2), "files: a", "", "again")
    report.verdict((2,), "files: b", "raw words 'x' in 1", "again 2")
    report.verdict((2,), "files: b", "raw words 'x' in 2", "again 3")
    assert report.failures == 2
    assert report.kinds() == ["files: b: 2 x raw words 'x' in 1 [again 2]"]
    assert "| files | a, b | 1, 2 | 3 | 2 | 7 |" in page.page(report)
    monkeypatch.setitem(campaign.PARTS, "none", "no_such_file")
    assert campaign.main(["none", "--no-page"]) == 1
    assert "the campaign itself: none" in capsys.readouterr().out
    assert "no_such_file" in campaign.run_part("none", 1, 0).kinds()[0]


def test_every_point_has_tests_and_the_page_names_them():
    assert [point for point, tests in page.marked().items() if not tests] == []
    assert page.held() in page.PAGE.read_text(), "python -m faults.page"


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: 0, ""),
        (lambda: time.sleep(60), "hang"),
        (lambda: os.abort(), "exit status -6"),
        (lambda: bytearray(1 << 40) and 0, "raw words 'Traceback"),
        (lambda: 1, "silent"),
        (lambda: os.write(2, b"sd-hyena: x: TypeError: (--debug shows where)\n") and 1, "raw words"),
        (lambda: os.write(2, b"libtiff: something\n") and 0, "raw line"),
    ],
)
def test_trials_may_end_anyhow(work, expected, monkeypatch):
    monkeypatch.setattr(child, "PATIENCE", 1)
    wrong = child.judged(child.call(work, 1.0), limit=1.0)
    assert wrong.startswith(expected)
    assert bool(wrong) == bool(expected)


def test_what_damages_files_changes_them_and_is_the_same_for_a_seed(tmp_path):
    unet = hyena_files.make_unet()
    data = hyena_files.hyena_file(unet, tmp_path / "x.safetensors")
    for change in (hostile.damaged, tensor_files.mutated):
        made = [change(data, Random(number)) for number in range(60)]
        assert made == [change(data, Random(number)) for number in range(60)]
        assert sum(each[1] != data for each in made) > 50
    documents = [hostile.mutated_json({"a": {"b": [1, 2]}, "c": "d"}, Random(n))[1] for n in range(60)]
    assert sum(document != json.dumps({"a": {"b": [1, 2]}, "c": "d"}) for document in documents) > 50


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        (lambda unet, path: {}["no such key"], "raw words 'Traceback"),
        (lambda unet, path: [], "silent: exit status 0"),
        (lambda unet, path: _half_attached(unet), "half patched"),
        (lambda unet, path: print("\x1b[31m") or [], "control character"),
        (lambda unet, path: _refused("it is wrong, whatever it is"), "unnamed"),
    ],
)
@pytest.mark.reliability(1, 5)
def test_bad_readers_of_hyena_files_are_found(reader, expected, monkeypatch):
    monkeypatch.setattr("sd_hyena.load_hyena", reader)
    found = campaign.run_part("hyena", 0.008, 0).kinds()
    assert any(expected in line for line in found), found


def _half_attached(unet):
    unet.conv_in = torch.nn.Identity()
    _refused("x.safetensors does not fit, it seems")


def _refused(text):
    from sd_hyena.errors import CheckpointError

    raise CheckpointError(text)


@pytest.mark.reliability(3)
def test_payloads_are_live_and_running_one_is_found(monkeypatch, tmp_path):
    ran = 0
    for name, load in pickles.payloads().items():
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        pickles.plant(folder)
        data = pickles.pickled({"a": load}, 2)
        if not name.startswith(("time", "collections")):  # which only wait
            child.call(lambda data=data: bool(pickle.loads(data)), 5, cwd=folder)
            ran += (folder / pickles.RAN).exists()
    assert ran >= 20
    monkeypatch.setattr("torch.load", lambda file, **options: pickle.loads(Path(file).read_bytes()))
    found = campaign.run_part("pickles", 0.2, 0).kinds()
    assert any("its payload ran" in line for line in found), found


@pytest.mark.reliability(18)
def test_who_tries_the_network_is_found(tmp_path):
    note = tmp_path / network.ASKED
    ending = child.call(lambda: network.blocked(child.command(["info", "somebody/something"]), str(note)), 20)
    assert ending.status in (1, 2)
    assert "huggingface.co" in note.read_text()


@pytest.mark.reliability(13, 14)
def test_meddling_reaches_what_computes_and_results_are_compared(tmp_path):
    x = torch.ones(4, 4)
    with meddle.Meddler(meddle.not_a_number(2, float("nan"))) as meddler:
        assert bool((x @ x).isfinite().all())
        assert not bool((x @ x).isfinite().any())
    assert meddler.count == 2
    few = torch.ones(1, 1, 4, 4)
    with meddle.Meddler(lambda count, output: None):
        spoilt = torch.nn.functional.scaled_dot_product_attention(few * float("inf"), few, few)
    assert not bool(spoilt.isfinite().any())
    with meddle.Meddler(meddle.larger_than(32)), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        x @ x
    with meddle.Meddler(meddle.out_of_memory(1, 1, True)), pytest.raises(torch.OutOfMemoryError):
        x @ x
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert bool(trouble.huge(torch.ones(2, dtype=dtype)).isfinite().all())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, grey in (("a", 100), ("b", 110)):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / name / "image_000.png")
    assert trouble.differs(tmp_path / "a", tmp_path / "b") == "another picture: image_000.png"
    assert trouble.differs(tmp_path / "a", tmp_path / "a") == trouble.not_finite_in(tmp_path / "a") == ""
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "image_000.png")
    assert trouble.not_finite_in(tmp_path / "a") == "silent: image_000.png is black"
    save_file({"x": torch.tensor([float("nan")])}, tmp_path / "b" / "x.safetensors")
    assert "holds NaN" in trouble.not_finite_in(tmp_path / "b")


def test_tables_of_times_are_not_taken_for_results_that_are_always_alike():
    stems = [line.split()[-1] for name, line in COMMANDS.items() if name.startswith("benchmark")]
    assert len(stems) == 3
    assert all(f"{stem}.md".endswith(TELL_TIMES) for stem in stems)


@pytest.mark.reliability(14)
@pytest.mark.parametrize(
    ("weight", "said"), [("blocks.weight", ""), ("out_proj.bias", "another result: IN01 of Hyena-00001.safetensors")]
)
def test_hyena_files_are_compared_by_what_they_compute(tmp_path, weight, said):
    """The weight of the only block of a grid changes nothing."""
    layer = trained(OperatorConfig(8, 4, 4, attention_heads=2, block=4))
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        checkpoint.save(folder / "Hyena-00001.safetensors", {"IN01": layer})
        with torch.no_grad():
            layer.get_parameter(weight).add_(0.1)
    assert trouble.differs(tmp_path / "a", tmp_path / "b") == said


@pytest.mark.parametrize(
    ("part", "scale"), [("hyena", 0.02), ("recipes", 0.03), ("pictures", 0.015), ("pickles", 0.1), ("prepared", 0.04)]
)
@pytest.mark.reliability(1, 2, 3, 4, 5)
def test_a_sample_of_hostile_files_ends_in_zeros(part, scale):
    report = campaign.run_part(part, scale, 0)
    assert not report.failures, "\n".join(report.kinds())
    assert sum(row.tried for row in report.rows.values()) >= 4
