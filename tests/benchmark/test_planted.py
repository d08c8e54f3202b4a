"""The planted bed: what it teaches from is what it says, what is put around operators is too, and it runs."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import planted

    return planted


def test_every_student_starts_and_runs(planted):
    torch.manual_seed(0)
    bed = planted.Bed("mixed", 0)
    for name in planted.STUDENTS:
        student = bed.student(name)
        with torch.no_grad():
            assert student(bed.x[:1], (32, 32)).shape == bed.x[:1].shape
        learning = [p for group in student.parameter_groups(1e-3, 0.0) for p in group["params"]]
        assert {id(p) for p in learning} == {id(p) for p in student.parameters()}, name


def test_what_is_around_an_operator_starts_at_nothing_and_is_what_it_says(planted):
    torch.manual_seed(0)
    operator = planted.build(planted.OperatorConfig(64, 8, 8, attention_heads=4))
    x = torch.randn(1, 64, 64)
    plain = operator(x, (8, 8))
    short, gates = planted.Wrapped(operator, True, False), planted.Wrapped(operator, False, True)
    for wrapped in (short, gates):
        assert_close("start", plain, wrapped(x, (8, 8)), 1e-5)
    gates.gate.bias.data.fill_(2)
    assert_close("gate", 2 * plain, gates(x, (8, 8)), 1e-5)
    short.short.weight.data.zero_()
    short.short.weight.data[:, 0, 1, 0] = 1  # each cell is its neighbour to the left
    shifted = torch.nn.functional.pad(x.view(1, 8, 8, 64), (0, 0, 1, 0))[:, :, :8].flatten(1, 2)
    assert_close("short filter", operator(shifted, (8, 8)), short(x, (8, 8)), 1e-5)


def test_students_without_a_fit_or_rates_of_their_own(planted):
    bed = planted.Bed("local", 0)
    fitted, bare, one_rate = (bed.student(f"states 8 + near 3{more}") for more in ("", ", not fitted", ", one rate"))
    assert fitted.near.weight.abs().max() > 0.05
    assert not bare.near.weight.any()
    assert not bare.blocks.weight.any()
    assert bed.error(fitted) < bed.error(bare)
    assert {group["lr"] for group in one_rate.parameter_groups(1e-3, 0.0)} == {1e-3}


def test_the_teacher_is_softmax_attention_with_its_bias(planted):
    bed = planted.Bed("mixed", 0)
    a, x = bed.attention, bed.x[:1]
    q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (a.to_q, a.to_k, a.to_v))
    cells = torch.arange(32 * 32)
    squared = (cells // 32 - (cells // 32)[:, None]) ** 2 + (cells % 32 - (cells % 32)[:, None]) ** 2
    for head, sigma in enumerate((2, 5, math.inf, math.inf)):
        weights = (q[:, head] @ k[:, head].transpose(1, 2) / 4 - squared / (2 * sigma**2)).softmax(-1)
        expected = a.to_out[0].weight[:, 16 * head : 16 * head + 16] @ (weights @ v[:, head]).transpose(1, 2)
        bed.y[:1] -= expected.transpose(1, 2)
    assert bed.y[0].abs().max() < 1e-4
    facts = bed.facts()
    assert 0.3 < facts["mass_7"] < 0.6  # half of the heads look everywhere
    assert 0.5 < facts["entropy"] < 0.95


def test_it_runs_goes_on_and_refuses_unknown_students(planted, tmp_path, monkeypatch, capsys):
    stem = tmp_path / "p"

    def run(students):
        options = ["--teachers", "mixed", "--seeds", "1", "--steps", "12", "--seconds", "0.2", "--students", students]
        monkeypatch.setattr(sys, "argv", ["planted.py", "--out", str(stem), *options])
        planted.main()

    run("linear")
    first = json.loads(stem.with_suffix(".json").read_text())["rows"]
    capsys.readouterr()
    run("linear;states 4 + near 3")
    assert capsys.readouterr().out.count("mixed/0/") == 1  # what was there is not measured again
    rows = json.loads(stem.with_suffix(".json").read_text())["rows"]
    assert rows["mixed/0/linear"] == first["mixed/0/linear"]
    hybrid = rows["mixed/0/states 4 + near 3"]
    assert set(hybrid["without"]) == {"near", "states", "global"}
    assert hybrid["start"] < rows["mixed/0/linear"]["start"]  # fitted to the teacher's attention
    assert hybrid["steps"] < rows["mixed/0/linear"]["steps"] < rows["mixed/0/linear"]["start"]
    assert "| states 4 + near 3 |" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no student 'flash'"):
        run("flash")
