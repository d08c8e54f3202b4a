"""Paths as users write them: ~, blanks, commas and other signs in names, files that appear meanwhile."""

import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_hyena import checkpoint
from sd_hyena.anatomy.settings import AnatomySettings
from sd_hyena.benchmark.settings import ImageSettings, LayerSettings, SizesSettings
from sd_hyena.cli import main
from sd_hyena.distill.prepare_settings import PrepareSettings
from sd_hyena.distill.settings import TrainSettings
from sd_hyena.evaluate.settings import EvaluateSettings
from sd_hyena.files import write_new
from sd_hyena.generate.settings import GenerateSettings, split_entries
from sd_hyena.models import DEMO, locate, unet_skeleton
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets

QUICK = ["-m", "demo", "-p", "a frog", "-W", "64", "-H", "64", "-s", "1", "-k", "7", "-n", "2"]
NAMES = ("a, b+c 100% ü{x}.safetensors", " lead.safetensors", "plain.safetensors")


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A home folder with files of an operator at IN01, under names that are not easy."""
    home = tmp_path_factory.mktemp("home")
    target = find_targets(unet_skeleton(locate(DEMO)))["IN01"]
    torch.manual_seed(0)
    operators = {"IN01": build(OperatorConfig(target.dim, 8, 8, attention_heads=target.heads))}
    for name in NAMES:
        checkpoint.save(home / name, operators)
    return home


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder; the working folder is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def generate(folder, *options):
    return main(["generate", *QUICK, "-o", str(folder), *map(str, options)])


@pytest.mark.parametrize(
    "kind",
    [
        GenerateSettings, TrainSettings, PrepareSettings, EvaluateSettings, AnatomySettings, LayerSettings,
        SizesSettings, ImageSettings,
    ],
)  # fmt: skip
def test_every_path_is_marked_as_one(kind):
    paths = "model teacher_model out_dir out log_dir data_dir prompts images pretrained_weight clip_model compare"
    named = {f.name for f in fields(kind)} & set(paths.split())
    assert named <= {f.name for f in fields(kind) if f.metadata["path"]}


@pytest.mark.compatibility("Prompts and paths", "`--out_dir=~/x`, and `~` in every other path", "the home folder")
def test_home_in_every_command(home, students, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(students))
    assert generate("~/drawn", "-y", "~/plain.safetensors,~/plain.safetensors", "-f", "{h}{n}", "-n", "1") == 0
    assert len(list((students / "drawn").iterdir())) == 2
    assert main(["info", "~/plain.safetensors"]) == 0
    monkeypatch.setenv("HOME", str(home))
    (home / "p.txt").write_text("a fox\n")
    (home / "r.toml").write_text('teacher_model = "~/m"\nout_dir = "~/taught"\nprompts = "~/p.txt"\n')
    capsys.readouterr()
    assert main(["train", "--config=~/r.toml", "-l=~/log", "--print_config"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for name, path in (("teacher_model", "m"), ("out_dir", "taught"), ("prompts", "p.txt"), ("log_dir", "log")):
        assert f'{name} = "{home}/{path}"' in printed
    layer = ["-W", "64", "-H", "64", "--dim", "8", "--heads", "2", "--kinds", "sdp-math", "--repeats", "1"]
    assert main(["benchmark", "layer", *layer, "--out=~/times"]) == 0
    assert main(["benchmark", "layer", *layer, "--compare=~/times.json"]) == 0
    for name in ("report.html", "anatomy.md"):
        (home / name).write_text("mine")
    for words, message in (
        ("benchmark layer --out=~/times", "/times.json exists"),
        ("demo -o=~", "/report.html exists"),
        ("anatomy -m demo -o=~", "/anatomy.md exists"),
        ("evaluate -m demo -y ~/none --prompts=~/p.txt", "/none"),
        ("evaluate -m ~/none -y ~/p.txt", "/none not found"),
        ("prepare -m demo --images=~/none", "/none: No such file"),
        ("prepare -m demo --prompts=~/none", "/none: cannot be read: No such file"),
        ("train -m demo -p=~/none", "/none, but must be an existing Hyena file"),
    ):
        assert main(words.split()) == 2
        assert f"{home}{message}" in capsys.readouterr().err
    assert main(["train", "-m", "demo", "--data_dir=~/my data"]) == 2
    assert f"sd-hyena prepare -o '{home}/my data' makes one" in capsys.readouterr().err
    assert not list((home.parent / "work").iterdir())


def test_homes_of_nobody(home, capsys):
    assert main(["generate", "-m", "~no-such-user/x", "-p", "a fox"]) == 2
    assert "model ~no-such-user/x not found" in capsys.readouterr().err


@pytest.mark.compatibility("Prompts and paths", "Hyena files with commas, blanks, + and % in their names", "works")
def test_every_file_can_be_named(tmp_path, students, monkeypatch):
    monkeypatch.chdir(students)
    folder = tmp_path / "pictures 50% [é]"
    entries = f"{NAMES[2]},{NAMES[0]}, {NAMES[2]} ,{NAMES[1]},"
    assert generate(folder, "-n", "1", "-y", entries, "-f", "100% {h}") == 0
    found = [pixels(folder / f"100% {h}.png") for h in range(5)]
    assert all((found[0] == other).all() for other in found[1:4])
    assert (found[4] != found[0]).any()
    assert "Hyena: a, b+c 100% ü{x}.safetensors" in Image.open(folder / "100% 1.png").text["parameters"]


@settings(max_examples=100, deadline=None)
@given(name=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/~") | st.sampled_from(",+ ")))
def test_one_file_of_any_name(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    path = folder / f"x{name[:40]}.safetensors"
    path.touch()
    assert split_entries(str(path)) == [[str(path)]]
    assert split_entries(f"{path},no-such+{path}") == [[str(path)], ["no-such", str(path)]]
    path.unlink()


def test_files_that_are_not_there_are_split_at_every_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_entries("a,b+c,") == [["a"], ["b", "c"], []]
    assert split_entries("") == [[]]
    assert split_entries(" , a ++ b") == [[], ["a", "b"]]
    for name in ("a,b", "a,b+c"):
        (tmp_path / name).touch()
    assert split_entries("a,b+c,a,b,c+a,b") == [["a,b+c"], ["a,b"], ["c", "a,b"]]
    assert split_entries("x" * 5000) == [["x" * 5000]]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.compatibility("Prompts and paths", "a picture that appears under a name meanwhile", "kept; both are")
def test_what_appears_meanwhile_is_kept(tmp_path, monkeypatch, capsys, caplog, links):
    from sd_hyena.generate import hires

    sample = hires.sample

    def slow(*arguments, **options):
        for name in ("image_001.png", "image_001-1.png", "grid.png"):
            (tmp_path / name).write_bytes(b"mine")
        return sample(*arguments, **options)

    monkeypatch.setattr(hires, "sample", slow)
    if not links:
        monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    assert generate(tmp_path, "--grid") == 0
    assert {p.name for p in tmp_path.iterdir() if p.read_bytes() == b"mine"} == {
        "image_001.png", "image_001-1.png", "grid.png",
    }  # fmt: skip
    assert Image.open(tmp_path / "image_001-2.png").text["parameters"].split("\n")[2].count("Seed: 8")
    assert Image.open(tmp_path / "grid-1.png").size[0] > 128
    assert {p.suffix for p in tmp_path.iterdir()} == {".png"}
    printed = capsys.readouterr().out
    assert "image_001-2.png seed 8" in printed
    assert "grid-1.png" in printed
    assert f"{tmp_path}/image_001.png has appeared meanwhile: this file is image_001-2.png" in caplog.messages
    monkeypatch.setattr(hires, "sample", sample)
    assert generate(tmp_path, "--grid", "--overwrite") == 0
    assert len(list(tmp_path.iterdir())) == 6
    assert pixels(tmp_path / "image_001.png").shape == (64, 64, 3)


def test_many_writers_of_one_name_lose_nothing(tmp_path):
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        write_new(tmp_path / "a.b.png", bytes([number]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.read_bytes()[0] for p in tmp_path.iterdir()) == list(range(8))
    assert {p.name for p in tmp_path.iterdir()} == {"a.b.png", *(f"a.b-{n}.png" for n in range(1, 8))}
