"""JSON means one thing, and holds numbers alone that JSON has."""

import os
import re

import pytest

from sd_hyena import strict_json
from sd_hyena.errors import SdHyenaError


@pytest.mark.reliability(1, 2, 5)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is there twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[1e999]", "1e999 is too large a number"),
        ("[" + "9" * 5000 + "]", "99999999999999999999... is too large a number"),
        ("[" * 100_000, "is nested more than 64 deep"),
        ("[" * 66 + "]" * 66, "is nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "is nested more than 64 deep"),
        ('["\\ud800"]', "is not UTF-8 text"),
        (b'["\xff"]', "is not UTF-8 text"),
        ("", "line 1, column 1: Expecting value"),
        ('{"a": 1}}', "line 1, column 9: Extra data"),
        ("\ufeff{}", "line 1, column 1: Unexpected UTF-8 BOM"),
    ],
)
def test_what_means_two_things_or_none(text, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        strict_json.loads(text)


def test_what_is_meant_is_read():
    for text in ('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}', "[" * 64 + "]" * 64, "3", "9" * 300):
        assert strict_json.loads(text) == strict_json.json.loads(text)


@pytest.mark.reliability(1)
def test_files_have_a_limit_and_an_end(tmp_path):
    (tmp_path / "a.json").write_text("[" + " " * 100 + "]")
    assert strict_json.load(tmp_path / "a.json") == []
    with pytest.raises(ValueError, match="is larger than 0 MiB"):
        strict_json.load(tmp_path / "a.json", 100)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no file"):
        strict_json.load(tmp_path / "pipe")


@pytest.mark.reliability(13)
def test_what_is_not_finite_is_never_written():
    with pytest.raises(SdHyenaError, match=r"^x\.json: not written: rows\.1\.psnr is not finite$"):
        strict_json.dumps({"rows": [{"psnr": 1.0}, {"psnr": float("nan")}]}, "x.json")
    assert strict_json.dumps({"a": [1.5]}, "x.json") == '{"a": [1.5]}'
