"""What cannot work is said in one line before a model is loaded, and leaves nothing behind."""

import dataclasses
import logging
import os
import subprocess
import sys

import pytest
import torch

from sd_hyena import cli, sources
from sd_hyena.anatomy.settings import AnatomySettings
from sd_hyena.benchmark.settings import ImageSettings, LayerSettings, SizesSettings
from sd_hyena.cli import main
from sd_hyena.distill.prepare_settings import PrepareSettings
from sd_hyena.distill.settings import TrainSettings
from sd_hyena.evaluate.settings import EvaluateSettings
from sd_hyena.generate.settings import GenerateSettings

QUICK = ["-p", "a fox", "-W", "64", "-H", "64", "-s", "2", "-n", "1", "-k", "1", "--device", "cpu"]
LONG = "a" * 300


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command that must fail before it loads a model; returns its one line."""
    monkeypatch.chdir(tmp_path)
    for place in ("sd_hyena.models", "sd_hyena.benchmark.pipelines"):
        monkeypatch.setattr(f"{place}.load_pipeline", lambda *args, **options: pytest.fail("the model was loaded"))

    def run(*words):
        there = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:  # as argparse does
            sys.exit(main([str(word) for word in words]))
        assert stop.value.code == 2
        assert sorted(tmp_path.rglob("*")) == there
        error = capsys.readouterr().err
        assert error.startswith("sd-hyena: ")
        assert error.count("\n") == 1
        assert len(error) < 300
        return error

    return run


@pytest.mark.compatibility("Prompts and paths", "a folder to write that is a file, or lies in one", "refused at once")
@pytest.mark.parametrize("name", ["file", "file/x", "file/x/y"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "-m", "demo", *QUICK, "-o"],
        ["prepare", "-m", "demo", "-o"],
        ["train", "-m", "demo", "-o"],
        ["train", "-m", "demo", "-l"],
        ["evaluate", "-m", "demo", "-y", "demo", "-o"],
        ["anatomy", "-m", "demo", "-o"],
        ["demo", "-o"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_a_file(refused, tmp_path, words, name):
    (tmp_path / "file").write_text("")
    assert "a file, but must be a folder" in refused(*words, name)


def test_tables_in_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out file: is a file, but must be a folder" in refused("benchmark", "layer", "--out", "file/x")


@pytest.mark.compatibility("Prompts and paths", "names too long for a file", "refused: the name, shortened")
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "-m", "demo", *QUICK, "-o", LONG],
        ["generate", "-m", "demo", *QUICK, "-y", LONG],
        ["generate", "-m", LONG, *QUICK],
        ["prepare", "-m", "demo", "--prompts", LONG],
        ["prepare", "-m", "demo", "--images", LONG],
        ["train", "-m", "demo", "-p", LONG],
        ["train", "-m", "demo", "--config", LONG],
        ["info", LONG],
        ["convert", "demo", "-o", LONG],
        ["merge", "demo", LONG, "-o", "x"],
        ["benchmark", "layer", "--out", LONG],
        ["demo", "-o", LONG],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_names_that_are_too_long(refused, words):
    error = refused(*words)
    assert "File name too long" in error
    assert LONG not in error


SETTINGS = {
    "generate": (GenerateSettings, ["-m", "demo", "-p", "x"]),
    "prepare": (PrepareSettings, ["-m", "demo"]),
    "train": (TrainSettings, ["-m", "demo"]),
    "evaluate": (EvaluateSettings, ["-m", "demo", "-y", "demo"]),
    "anatomy": (AnatomySettings, ["-m", "demo"]),
    "benchmark layer": (LayerSettings, []),
    "benchmark sizes": (SizesSettings, []),
    "benchmark image": (ImageSettings, ["-m", "demo"]),
}


@pytest.mark.reliability(2, 17)
@pytest.mark.parametrize("command", SETTINGS)
def test_every_number_has_bounds(refused, command):
    """Nothing is planned, imported or loaded for what would take gigabytes or years."""
    settings, base = SETTINGS[command]
    numbers = [f for f in dataclasses.fields(settings) if f.type in ("int", "float")]
    assert numbers
    for f in numbers:
        wrong = ["-2", "1" + "0" * 30] + (["nan", "inf", "1e30"] if f.type == "float" else ["1000000000000000000000"])
        for value in wrong:
            assert f.name in refused(*command.split(), *base, f"--{f.name}={value}")


@pytest.mark.reliability(17)
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("generate -m demo -p x -n 4000 -i 99999", "more than 100000 pictures"),
        (f"generate -m demo -p x -y {'a,' * 2000}", "more than 1000 files"),
        ("train -m demo -n 9999999 -s 1", "--save_every_n_steps 1 of 9999999 steps"),
        ("train -m demo --mixed_precision fp16 --device cpu", "--mixed_precision fp16 trains on a GPU alone"),
        (f"prepare -m demo --sizes {','.join(f'8x{8 * n}' for n in range(1, 1200))}", "more than 1000 sizes"),
        ("demo --n_images 1000000000", "--n_images is 1000000000, but must be from 1 to 1000000"),
        ("targets -m demo -W 1000000000", "the largest supported size is 16384"),
        ("generate -m demo -p x --device cpu:7", "--device 'cpu:7': use auto"),
        (f"generate -m demo -p x --steps {'9' * 5000}", "--steps: invalid int value"),
    ],
    ids=lambda words: words[:40],
)
def test_work_without_end_is_refused(refused, words, named):
    assert named in refused(*words.split())


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "vulkan", "cuda:99", "cuda", "cpu:x"])
def test_devices_that_are_not_there(refused, monkeypatch, device):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:99")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--device" in refused("generate", "-m", "demo", *QUICK[:-1], device)


@pytest.mark.parametrize("command", ["generate", "evaluate", "benchmark image"])
def test_a_layer_twice_in_a_stack(refused, command):
    words = ["-p", "x"] if command == "generate" else []
    assert "layer IN01 is in more than one" in refused(*command.split(), "-m", "demo", "-y", "demo+demo", *words)


@pytest.mark.compatibility("High resolution", "`--hires` on an inpainting model", "refused before it is loaded")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_hires_on_an_inpainting_model(refused, thin_model, saved_folder, kind):
    model = thin_model("sd15_inpainting").path if kind == "file" else saved_folder("sd15_inpainting")
    assert "is an inpainting model" in refused("generate", "-m", model, *QUICK, "-s", 5, "--hires", "128x128")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", "-m", "demo", *QUICK, "--steps", "2.5"], "-s/--steps: invalid int value: '2.5'"),
        (["generate", "-m", "demo", *QUICK, "--scheduler", "DPM++ 2M Karras"], "--scheduler: invalid choice: 'DPM++"),
        (["generate", "-m", "demo", "-p"], "-p/--prompt: expected one argument"),
        (["generate", "-m", "demo", *QUICK, "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_flags_that_are_wrong(refused, words, named):
    with_choices = refused(*words)
    assert named in with_choices
    assert with_choices.endswith("(see sd-hyena generate --help)\n")


def test_a_benchmark_that_there_is_not_is_named(refused):
    assert refused("benchmark", "layer", "--nothing", "x").endswith("(see sd-hyena benchmark --help)\n")


@pytest.mark.compatibility("Hyena files", "`-y user/x` without a network", "one line, after one try")
def test_the_hub_is_tried_once(tmp_path):
    """A process of its own: the client reads its settings when it is imported, and asks for news of its own then."""
    code = (
        "import socket, sys\n"
        "tried = []\n"
        "def connect(*args, **options):\n"
        "    tried.append(1)\n"
        "    raise OSError('no route')\n"
        "socket.create_connection = connect\n"
        "from sd_hyena.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "sys.exit(status if len(tried) <= 2 else f'tried {len(tried)} times')\n"
    )
    words = ["generate", "-m", "demo", "-p", "a fox", "-y", "user/x"]
    here = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "NO_PROXY": "*"}
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | here
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert done.stderr == (
        "sd-hyena: user/x: no such file or folder; as a hub id: not in the hub's local cache, and the hub cannot be "
        "reached\n"
    )
    assert done.returncode == 1


def test_a_hub_that_fails_is_one_that_cannot_be_reached(monkeypatch):
    from types import SimpleNamespace

    from huggingface_hub import errors

    for status, answers in ((404, True), (401, True), (503, False)):
        error = errors.HfHubHTTPError("x", response=SimpleNamespace(status_code=status, headers={}, request=None))

        def ask(*args, error=error, **options):
            raise error

        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
        assert sources._answers("url", None) is answers


def test_our_lines_alone_are_printed_and_once(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    for _ in range(2):
        cli._log_our_lines_alone()
    logging.getLogger("sd_hyena.x").info("ours")
    logging.getLogger("accelerate.x").warning("theirs")
    logging.getLogger("huggingface_hub.x").warning("theirs")
    assert capsys.readouterr().err == "sd-hyena: ours\n"


@pytest.mark.parametrize("data", [[], ["--data", "noise"]], ids=["pictures", "noise"])
def test_a_model_that_cannot_be_had_leaves_no_folder(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["train", "-m", "user/x", "-o", "a/out", "-l", "b/logs", "--device", "cpu", *data]) == 1
    assert "user/x" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.compatibility("High resolution", "sizes written with x, × or *", "works")
@pytest.mark.parametrize("sign", ["x", "X", "×", "*", " x "])
def test_sizes_by_any_sign(sign):
    from sd_hyena.distill.prepare_settings import parse_sizes
    from sd_hyena.generate.settings import GenerateSettings
    from sd_hyena.generate.stages import stages

    settings = GenerateSettings("demo", "x", width=64, height=64, hires=f"128{sign}128")
    assert (stages(settings)[1].width, stages(settings)[1].height) == (128, 128)
    assert parse_sizes(f"64{sign}96,96x64") == [(64, 96), (96, 64)]


@pytest.mark.compatibility(
    "Prompts and paths", "A1111's signs: `(fox:1.3)`, `BREAK`, `<lora:x:1>`", "drawn literally; a line says so"
)
def test_signs_that_mean_nothing_are_named(tmp_path, caplog):
    prompt = "(an old fox:1.3), [cat] (plain) at 12:30 BREAK dog <lora:foo_bar:1> <lora:baz:0.5>"
    assert main(["generate", "-m", "demo", *QUICK, "-o", str(tmp_path), "-q", "(dog: 0.8)", "-p", prompt]) == 0
    (line,) = [record.message for record in caplog.records if "drawn literally" in record.message]
    assert line.startswith("prompt: (an old fox:1.3), BREAK, <lora:foo_bar:1> ...: drawn literally")
