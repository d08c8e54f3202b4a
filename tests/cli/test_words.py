"""Words of the command line reach their options as they were typed, or are refused in one line."""

import os
import subprocess
import sys
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_hyena.cli import generate, main
from sd_hyena.cli.parser import Parser

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
