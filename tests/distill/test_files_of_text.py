"""Prompts files, captions and recipes as other programs write them."""

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_hyena.cli import main
from sd_hyena.distill.prompts import list_images, read_prompts
from sd_hyena.errors import UsageError

PROMPTS = ["a fox", "a café at night"]
LINES = "# animals\na fox\n\n  a café at night \t\n"


def written(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@pytest.mark.compatibility("Prompts and paths", "text with a byte order mark, CRLF or CR, blanks at line ends", "works")
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_prompts_files(tmp_path, mark, end):
    assert read_prompts(written(tmp_path / "p.txt", mark + LINES.replace("\n", end))) == PROMPTS


@pytest.mark.compatibility("Prompts and paths", "comments in prompts files, indented ones too", "left out")
def test_comments(tmp_path):
    assert read_prompts(written(tmp_path / "p.txt", "# one\n  # two\n\t#three\na #4 bus\n")) == ["a #4 bus"]


@pytest.mark.parametrize("name", ["p.json", "p.JSONL", "p.yaml"])
def test_files_that_are_no_lists_of_lines(tmp_path, name):
    with pytest.raises(UsageError, match="must be plain text with one prompt a line"):
        read_prompts(written(tmp_path / name, '{"prompts": ["a fox"]}'))


def test_signs_that_mean_nothing_are_said_once_of_a_file(tmp_path, caplog):
    path = written(tmp_path / "p.txt", "a (red:1.2) fox\na cat\n")
    assert read_prompts(path) == read_prompts(path) == ["a (red:1.2) fox", "a cat"]
    assert len([m for m in caplog.messages if "(red:1.2): drawn literally" in m]) == 1


def test_files_joined_from_several_keep_no_marks(tmp_path):
    assert read_prompts(written(tmp_path / "p.txt", ("\ufeff" + LINES) * 2)) == PROMPTS * 2


def test_lines_end_at_line_ends_alone(tmp_path):
    lines = ["one\u2028line", "one\u0085line", "one\x0cline", "one\u2029line", "one\x1cline"]
    assert read_prompts(written(tmp_path / "p.txt", "\n".join(lines))) == lines


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff")).map("a {} b".format),
        min_size=1,
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_any_prompt_comes_back(tmp_path_factory, prompts, end, mark):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    assert read_prompts(written(path, mark + end.join(prompts))) == prompts


BAD = [
    ("a café".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    ("a fox".encode("utf-16-be"), "line 1 has the control character '\\x00': save it as UTF-8 text"),
    (b"\xfe\xff" + "a café".encode("utf-16-be"), "is UTF-16 text: save it as UTF-8"),
    ("a café".encode("utf-32"), "is UTF-32 text: save it as UTF-8"),
    ("a fox\na café\n".encode("latin-1"), "line 2 is not UTF-8 text (Latin-1?): save the file as UTF-8"),
    (b"a fox\r\n\x1b[1ma bear", "line 2 has the control character '\\x1b': save it as UTF-8 text"),
    (b"a \xed\xa0\x80 fox", "line 1 is not UTF-8 text"),
]


@pytest.mark.compatibility("Prompts and paths", "text in UTF-16 or Latin-1; a folder or pipe", "refused in one line")
@pytest.mark.parametrize(("data", "message"), BAD)
@pytest.mark.parametrize("kind", ["prompts file", "caption", "recipe"])
def test_other_encodings_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, kind, data, message):
    monkeypatch.setattr("sd_hyena.models.load_pipeline", None)
    path = tmp_path / "01.txt"
    written(path, data)
    (tmp_path / "01.png").touch()
    command = {
        "prompts file": ["prepare", "-m", "demo", "--prompts", str(path)],
        "caption": ["prepare", "-m", "demo", "--images", str(tmp_path)],
        "recipe": ["train", "-m", "demo", "--config", str(path)],
    }[kind]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{kind} {path}: {message}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["prepare -m demo --prompts", "train -m demo --prompts", "train -m demo --config"])
def test_what_is_no_file_is_refused(tmp_path, capsys, command):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "pipe", "it is a pipe or device: write its text to a file"),
        ("/dev/null", "it is a pipe or device"),
        (tmp_path / "none", "No such file or directory"),
    ):
        assert main([*command.split(), str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: cannot be read: {message}" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_captions(tmp_path, mark):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    written(tmp_path / "a.txt", f"{mark}a café,\r\n at\u2028night \r")
    assert [image.caption for image in list_images(tmp_path)] == ["a café, at night"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_recipes(tmp_path, capsys, end):
    recipe = ["\ufeff# mine", 'teacher_model = "demo"', 'log_dir = "a \\"b\\\\ é"', "n_steps = 3", ""]
    path = written(tmp_path / "r.toml", end.join(recipe))
    assert main(["train", "--config", path, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert 'log_dir = "a \\"b\\\\ é"' in printed.splitlines()
    again = written(tmp_path / "again.toml", printed)
    assert main(["train", "--config", again, "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_control_characters_in_recipes_are_refused(tmp_path, capsys):
    path = written(tmp_path / "r.toml", 'teacher_model = "demo"\nout_dir = "a\\u0000b"\n')
    assert main(["train", "--config", path]) == 2
    assert "out_dir = 'a\\x00b' has the control character '\\x00'" in capsys.readouterr().err


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = written(tmp_path / "p.txt", LINES)

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UsageError, match=r"p\.txt: cannot be read: Permission denied"):
        read_prompts(path)


@pytest.mark.reliability(2, 17)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 30_000, "is nested too deep, or has a number too large"),
        ("n_steps = " + "9" * 5000, "is nested too deep, or has a number too large"),
        ("n_steps = " + "9" * 300, "--n_steps is .*, but must be below 2^64"),
        ("lr = nan", "--lr is nan, but must be a finite number"),
        ("lr = 1e999", "--lr is inf, but must be a finite number"),
        ("lr = " + "9" * 400, "--lr is too large, but must be a finite number"),
        ("a." * 30_000 + "a = 1", "no setting's name has so many parts"),
        ("[" + "'a' . " * 9_000 + "a]", "no setting's name has so many parts"),
        (f"near = [{'1,' * 900}]", r"near = \[1, 1.*\.\.\..* should be of type"),
        (f"operator = '{'x' * 900}'", r"operator = 'xxx.*\.\.\..* should be one of"),
        ("# " + "x" * 70_000, "is larger than 64 KiB"),
    ],
)
def test_recipes_that_cannot_be_read_are_one_line_at_once(tmp_path, capsys, text, message):
    path = written(tmp_path / "r.toml", text)
    assert main(["train", "-m", "demo", "--config", path, "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message.replace("^", r"\^"), line)
    assert len(line) < 400
    assert not (tmp_path / "out").exists()
