"""The campaign's detectors fire on planted faults, and a sample of it ends in zeros."""

from __future__ import annotations

import pytest

from faults import __main__ as campaign
from faults import page
from faults.judge import files_in, judge
from faults.report import Report

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
    report.verdict((1, 2), "files", "", "again")
    report.verdict((2,), "files", "raw words 'x' in 1", "again 2")
    report.verdict((2,), "files", "raw words 'x' in 2", "again 3")
    assert report.failures == 2
    assert report.kinds() == ["files: 2 x raw words 'x' in 1 [again 2]"]
    assert "| files | 1, 2 | 3 | 2 | 7 |" in page.page(report)
    monkeypatch.setitem(campaign.PARTS, "none", "no_such_file")
    assert campaign.main(["none", "--no-page"]) == 1
    assert "the campaign itself: none" in capsys.readouterr().out
    assert "no_such_file" in campaign.run_part("none", 1, 0).kinds()[0]
