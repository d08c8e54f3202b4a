"""Words of the command line reach their options as they were typed, or are refused in one line."""

import logging
import os
import re
import string
import subprocess
import sys
import unicodedata
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from sd_hyena import cli
from sd_hyena.cli import display, generate, main
from sd_hyena.cli.parser import Parser
from sd_hyena.errors import SdHyenaError
from sd_hyena.evaluate import page, tables
from sd_hyena.texts import one_line, printable, reason

BASE = ["generate", "-m", "demo", "-p", "a fox"]
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


def given_to(command, words):
    """What the command's own function is called with."""
    with mock.patch.object(command, "run", return_value=0) as run:
        assert main(words) == 0
    return run.call_args.args[0]


def generate_parser():
    parser = Parser()
    generate.add_arguments(parser)
    return parser


FLAGS = {*generate_parser().flags, "--debug"}


def is_flag(word):
    name = word.partition("=")[0]
    return word == "--" or name in FLAGS or (name.startswith("--") and "--" + name[2:].replace("-", "_") in FLAGS)


@pytest.mark.compatibility("Prompts and paths", "values that begin with a dash, `-p -fox`", "works")
@settings(max_examples=300, deadline=None)
@given(
    value=WORDS | WORDS.map("-{}".format) | WORDS.map("--{}".format),
    flag=st.sampled_from(["-p", "--prompt", "--pro", "-q", "--negative-prompt", "--negative_p", "-o", "--out-d"]),
    joined=st.booleans(),
)
def test_any_value_survives(value, flag, joined):
    if joined and value == "--":
        return
    words = ["generate", "-m", "demo", *([f"{flag}={value}"] if joined else [flag, value]), "-k", "-1"]
    if not joined and is_flag(value):
        with pytest.raises(SystemExit) as stop:
            given_to(generate, words)
        assert stop.value.code == 2
        return
    name = {"p": "prompt", "q": "negative_prompt", "n": "negative_prompt", "o": "out_dir"}[flag.strip("-")[0]]
    assert given_to(generate, words) == {"model": "demo", name: value, "seed": -1}


@pytest.mark.parametrize("flag", ["-p", "--prompt"])
@pytest.mark.parametrize("value", ["-fox", "--ultra-detailed fox", "-blurry", "-n4", "--out", "-", "a --b-c", "-1", ""])
def test_words_that_were_rewritten_or_refused(flag, value):
    assert given_to(generate, ["generate", "-m", "demo", flag, value])["prompt"] == value


@pytest.mark.parametrize("value", ["--grid", "--out-dir", "--out_dir=x", "-n", "--help", "-q=x", "--"])
def test_a_flag_is_no_value(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "-m", "demo", "-p", value])
    assert stop.value.code == 2
    expected = "sd-hyena: argument -p/--prompt: expected one argument (see sd-hyena generate --help)\n"
    assert capsys.readouterr().err == expected
    if value != "--":
        assert given_to(generate, ["generate", f"-p={value}"]) == {"prompt": value}


@pytest.mark.parametrize("word", ["-p=--", "--prompt=--"])
def test_two_dashes_alone_are_no_value(word, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", word])
    assert stop.value.code == 2
    assert f"argument {word.partition('=')[0]}: -- is no value (see " in capsys.readouterr().err


@pytest.mark.compatibility("Prompts and paths", "flags with dashes or underscores, whole or shortened", "works")
def test_dashes_underscores_and_beginnings():
    for flag in ("--out_dir", "--out-dir", "--out_d", "--out-d"):
        for words in ([flag, "two-part"], [f"{flag}=two-part"]):
            assert given_to(generate, [*BASE, *words])["out_dir"] == "two-part"
    assert given_to(generate, [*BASE, "--overw"])["overwrite"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-im", "2", "--n", "3"], "ambiguous option: --n could match --negative_prompt, "),
        (["--no-such-thing"], "unrecognized arguments: --no-such-thing"),
        (["--grid=yes"], "ignored explicit argument 'yes'"),
        (["-n", "-x"], "argument -n/--num_images: invalid int value: '-x'"),
        (["--scheduler", "-x"], "invalid choice: '-x'"),
    ],
)
def test_what_is_no_flag_or_value_is_named(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*BASE, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_numbers_below_zero(capsys):
    assert given_to(generate, [*BASE, "-k", "-1", "-c", "-1e-3"]) == {
        "model": "demo",
        "prompt": "a fox",
        "seed": -1,
        "cfg_scale": -0.001,
    }
    assert main([*BASE, "-n", "-2"]) == 2
    assert "--num_images is -2" in capsys.readouterr().err


def test_commands_within_commands():
    from sd_hyena.cli import benchmark

    words = ["benchmark", "image", "-m", "demo", "-y", "-x.safetensors", "--num-images", "2", "--ov"]
    assert given_to(benchmark, words) == {
        "what": "image",
        "model": "demo",
        "hyena": "-x.safetensors",
        "num_images": 2,
        "overwrite": True,
    }


def test_a_file_named_like_a_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "--", "-x.safetensors"]) == 1
    assert "-x.safetensors: no such file" in capsys.readouterr().err


@pytest.mark.compatibility("Prompts and paths", "bytes that are not UTF-8, control characters", "refused in one line")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "a fo\udce9"], "prompt 'a fo\\udce9' has bytes that are not UTF-8"),
        (["-q", "\udcff"], "negative_prompt '\\udcff' has bytes"),
        (["-o", "caf\udce9"], "out_dir 'caf\\udce9' has bytes that are not UTF-8: give it as UTF-8 (a file or folder:"),
        (["-p", "a\0b"], "prompt 'a\\x00b' has the control character '\\x00'"),
        (["-o", "a\0b"], "out_dir 'a\\x00b' has the control character '\\x00'"),
        (["-p", "\x1b[31mred"], "has the control character '\\x1b'"),
    ],
)
def test_what_is_no_text_is_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sd_hyena.models.load_pipeline", None)
    assert main([*BASE, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bytes_from_a_shell():
    command = [sys.executable, "-m", "sd_hyena", "generate", "-m", "demo", "-p", b"a fo\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "bytes that are not UTF-8" in done.stderr


def test_white_space_in_a_prompt_is_kept():
    assert given_to(generate, ["generate", "-p", "two\nlines\tand a tab\r\n"])["prompt"] == "two\nlines\tand a tab\r\n"


HOSTILE = "\x1b[31mred\x07 \x9b2J \u202eback \u2028line \ud800"


@pytest.mark.reliability(1, 16)
@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_what_is_printable_has_nothing_that_a_terminal_obeys(text):
    shown = one_line(text + HOSTILE)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202e\u2066" for c in shown)
    assert printable(shown) == shown
    assert printable("a\nb", lines=True) == "a\nb"


@pytest.mark.reliability(1)
def test_foreign_texts_pass_one_place(capsys):
    """Lines, tables with their titles and headings, bars, the log, and the last line of an error."""
    rows = SimpleNamespace(title=HOSTILE, headings=[HOSTILE, "x"], lines=[[HOSTILE, HOSTILE]])
    display.print_tables([rows])
    display.phase(HOSTILE)
    display.console.print(Text(HOSTILE))
    cli._log_our_lines_alone()
    logging.getLogger("sd_hyena.x").warning("%s\n%s", HOSTILE[:-1], HOSTILE[:-1])  # pytest passes it on, in UTF-8
    for error in (SdHyenaError(f"{HOSTILE}\n{HOSTILE}"), ValueError(HOSTILE)):
        with mock.patch.object(generate, "run", side_effect=error):
            assert main(["generate"]) == 1
    with pytest.raises(SystemExit):
        main(["generate", "-n", HOSTILE[:-1]])
    out, err = capsys.readouterr()
    assert r"\x1b[31mred\x07" in out
    assert not set(out + err) & set(HOSTILE.replace(" ", "")) - set(string.printable)
    assert err.count("\n") == 4
    assert all(line.startswith("sd-hyena: ") for line in err.splitlines())


@pytest.mark.reliability(16)
def test_names_in_reports_say_no_more_than_themselves():
    name = "a|b <img> [x](y) `c`\n\x1b"
    table = tables.markdown_table(tables.Table("", "", ["x", "y"], [[name, "1"]]))
    assert table.splitlines()[2] == r"| a\|b &lt;img> \[x](y) \`c\` \\x1b | 1 |"
    assert "<img>" not in page.table(["x"], [[name]]) + page.page(name) + page.keys([(name, name)])


ADVICE = "trust_remote_code|weights_only|allow_pickle|safe_serialization|HF_HUB_OFFLINE|pip install|http"


@pytest.mark.reliability(3)
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("It has code.\nPlease pass `trust_remote_code=True` to run it."), "It has code"),
        (ValueError("Load failed. We changed `weights_only` from `False` to `True`; allow_pickle=True"), "Load failed"),
        (OSError("x is no model, or set HF_HUB_OFFLINE=1 and see https://x.y"), "x is no model"),
        (ImportError("pip install x"), "ImportError"),
        (OSError(28, "No space left on device", "x"), "No space left on device"),
        (KeyError("weight"), "no 'weight'"),
        (MemoryError(), "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (RuntimeError("enforce fail\n\nException raised from x:\nframe #0"), "enforce fail"),
        (ValueError("one\ntwo\n  three"), "one two three"),
        (TypeError("expected a tensor, got <class 'numpy.str_'>"), "expected a tensor, got numpy.str_"),
        (ValueError("y" * 999), "y" * 217 + "..." + "y" * 20),
    ],
)
def test_a_librarys_words_without_its_advice(error, expected):
    assert reason(error) == expected
    assert not re.search(ADVICE, reason(error))


@pytest.mark.reliability(7)
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory: lower the size in px, the batch size or the pictures at a time"),
        (torch.OutOfMemoryError("Tried to allocate 3 GiB"), "out of memory: lower the size in px"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower"),
        (OSError(5, "Input/output error", "a\x1bfile"), r"a\x1bfile: Input/output error"),
        (AssertionError(), "AssertionError at cli/__init__.py:N (--debug shows where)"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal"), "UnicodeEncodeError at cli/__init__.py:N: 'ascii' codec"),
        (ValueError("one\ntwo\nthree"), "ValueError at cli/__init__.py:N: one two three (--debug shows where)"),
    ],
)
def test_errors_that_nobody_foresaw_are_one_line(error, line, capsys):
    with mock.patch.object(generate, "run", side_effect=error):
        assert main(["generate"]) == 1
    err = re.sub(r"py:\d+", "py:N", capsys.readouterr().err)
    assert err.startswith(f"sd-hyena: {line}")
    assert err.count("\n") == 1
