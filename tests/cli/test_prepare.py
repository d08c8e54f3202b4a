"""``sd-hyena prepare`` as a user types it, and training on what it makes, on the bundled model at 64 px."""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sd_hyena.cli import main

SMALL = shlex.split("-m demo --sizes 64x64 -n 4 --n_held_out 2 --draw_steps 1 -b 2")


def prepare(folder, *options):
    return main(["prepare", *SMALL, "-o", str(folder), *map(str, options)])


def train(folder, *options):
    small = shlex.split("-m demo -n 2 -b 2 -r 1e-3 -d 3 -s 0 --draw_steps 1")
    return main(["train", *small, "-o", str(folder), "-l", str(folder.parent / "logs"), *map(str, options)])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def prompts_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["prompts"])


def draw_images(folder, sizes):
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a caption,\nnumber {number}\n")
    return folder


def test_a_folder_says_what_it_holds(tmp_path, capsys, demo_pipe):
    data, channels = tmp_path / "data", demo_pipe.unet.config.in_channels
    assert prepare(data, "--sizes", "64x64,96x64", "--unconditional", "0.5") == 0
    assert "6 pictures in" in capsys.readouterr().out
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["identity"]["sizes"] == [[64, 64], [96, 64]]
    assert [(s["file"], s["size"], s["items"], s["held_out"]) for s in manifest["shards"]] == [
        ("shards/00000.safetensors", [64, 64], 3, [2]),
        ("shards/00001.safetensors", [96, 64], 3, [2]),
    ]
    for shard, shape in zip(manifest["shards"], ((3, channels, 8, 8), (3, channels, 8, 12)), strict=True):
        tensors = load_file(data / shard["file"])
        assert tensors["latents"].shape == shape
        assert tensors["prompt"].tolist() == [1, 0, 2]  # every second for the empty prompt
        prompts = prompts_of(data / shard["file"])
        assert prompts[0] == ""
        assert len(prompts) == len(set(prompts)) == len(tensors["states"]) == 3


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.nightly), (signal.SIGTERM, 143)]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, number, status, capsys):
    options = ["-n", "60", "--sizes", "64x64,72x64", "-b", "4"]
    straight, data = tmp_path / "straight", tmp_path / "data"
    assert prepare(straight, *options) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "sd_hyena", "prepare", *SMALL, *options, "-o", str(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    until = time.time() + 120
    manifest = data / "manifest.json"
    while not (manifest.exists() and '"file"' in manifest.read_text()):  # one shard is finished
        assert process.poll() is None, process.stdout.read()
        assert time.time() < until
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == status, process.stdout.read()
    first = contents(data)
    assert not (data / "shards" / "00003.safetensors").exists()
    assert train(tmp_path / "out", "--data_dir", data) == 1
    assert "of 4 shards: run prepare again to finish it" in capsys.readouterr().err
    kept = (data / "shards" / "00000.safetensors").stat().st_mtime_ns
    assert prepare(data, *options) == 0
    assert (data / "shards" / "00000.safetensors").stat().st_mtime_ns == kept
    assert contents(data) == contents(straight) != first
    assert not list(data.rglob(".*.tmp"))


def test_a_damaged_shard_is_refused_and_made_anew(tmp_path, capsys, caplog):
    data = tmp_path / "data"
    assert prepare(data, "-n", 40) == 0
    before = contents(data)
    shard = data / "shards" / "00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-9] ^= 1
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert train(tmp_path / "out", "--data_dir", data) == 1
    error = capsys.readouterr().err
    assert f"{shard}: its checksum is wrong: run prepare again to make it anew" in error
    assert error.count("\n") == 1
    assert prepare(data, "-n", 40) == 0
    assert [m for m in caplog.messages if "anew" in m] == [f"{shard}: its checksum is wrong: making it anew"]
    assert contents(data) == before
    shard.unlink()
    assert prepare(data, "-n", 40) == 0
    assert contents(data) == before


def test_other_data_are_not_overwritten_unless_asked(tmp_path, capsys):
    data = tmp_path / "data"
    assert prepare(data, "-n", 40) == 0
    before = contents(data)
    assert prepare(data, "--guidance", "5", "--draw_steps", "2") == 2
    error = capsys.readouterr().err
    for text in ("n_images was 40, is 4", "draw_steps was 1, is 2", "guidance was 3.0, is 5.0", "--overwrite"):
        assert text in error
    assert error.count("\n") == 1
    assert contents(data) == before
    assert prepare(data, "--overwrite") == 0
    assert len(contents(data)) == 2


@pytest.mark.reliability(8)
def test_shards_of_others_are_not_replaced_unasked(tmp_path, capsys):
    shard = tmp_path / "data" / "shards" / "00000.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"mine")
    assert prepare(tmp_path / "data") == 2
    assert f"{shard} exists, and no manifest.json says what it is" in capsys.readouterr().err
    assert shard.read_bytes() == b"mine"
    assert prepare(tmp_path / "data", "--overwrite") == 0


def test_two_runs_on_one_folder(tmp_path, capsys):
    from sd_hyena.files import locked

    with locked(tmp_path / "data"):
        assert prepare(tmp_path / "data") == 2
    assert "in use by another run" in capsys.readouterr().err


def test_captioned_images_are_encoded_and_taught(tmp_path):
    images = draw_images(tmp_path / "images", [(80, 80), (100, 60), (64, 64), (200, 130), (70, 60), (96, 64)])
    data = tmp_path / "data"
    assert prepare(data, "--images", images, "--sizes", "64x64,96x64") == 0
    manifest = json.loads((data / "manifest.json").read_text())
    assert sum(s["items"] for s in manifest["shards"]) == 6
    assert sum(len(s["held_out"]) for s in manifest["shards"]) == 2
    found = {tuple(s["size"]): prompts_of(data / s["file"])[1:] for s in manifest["shards"]}
    captions = {n: f"a caption, number {n}" for n in range(6)}
    assert sorted(found[64, 64]) == [captions[n] for n in (0, 2, 4)]
    assert sorted(found[96, 64]) == [captions[n] for n in (1, 3, 5)]
    assert train(tmp_path / "out", "--data_dir", data, "-n", 3) == 0
    (images / "03.txt").write_text("another caption")
    assert prepare(data, "--images", images, "--sizes", "64x64,96x64") == 2


@pytest.mark.parametrize("options", ["-W 64 -H 64", "--sizes 64x64,96x64 --unconditional 0.5"])
def test_a_prepared_folder_teaches_the_same_as_pictures_drawn_on_the_way(tmp_path, options):
    sizes = "64x64,96x64" if "--sizes" in options else "64x64"
    assert prepare(tmp_path / "data", "--sizes", sizes) == 0
    assert train(tmp_path / "own", *options.split(), "--n_images", 4, "--n_held_out", 2) == 0
    kept = [o for o in ["--unconditional", "0.5"] if "--unconditional" in options]
    assert train(tmp_path / "given", "--data_dir", tmp_path / "data", *kept) == 0
    own, given = (load_file(tmp_path / name / "Hyena-00002.safetensors") for name in ("own", "given"))
    assert own.keys() == given.keys()
    assert all(torch.equal(own[k], given[k]) for k in own)


def test_the_share_of_dropped_prompts_matters(tmp_path):
    assert prepare(tmp_path / "data") == 0
    for share in ("0", "1"):
        assert train(tmp_path / share, "--data_dir", tmp_path / "data", "-t", "OUT11", "--unconditional", share) == 0
    a, b = (load_file(tmp_path / share / "Hyena-00002.safetensors") for share in "01")
    assert not all(torch.equal(a[k], b[k]) for k in a)


def test_another_teachers_folder_is_refused(tmp_path, capsys):
    data = tmp_path / "data"
    assert prepare(data) == 0
    manifest = data / "manifest.json"
    text = manifest.read_text()
    ours = json.loads(text)["identity"]["teacher"]["attention_sha256"]
    manifest.write_text(text.replace(ours, "0123456789abcdef"))
    assert train(tmp_path / "out", "--data_dir", data) == 2
    error = capsys.readouterr().err
    assert "was made by another teacher" in error
    assert "0123456789abcdef" in error
    assert ours in error
    assert error.count("\n") == 1


def test_options_that_do_not_apply_are_named(tmp_path, caplog, capsys):
    data = tmp_path / "data"
    assert prepare(data, "--images", draw_images(tmp_path / "i", [(64, 64)] * 3), "--guidance", 4) == 0
    assert "--draw_steps, --guidance: for drawn pictures only; --images ignores it" in caplog.text
    assert main(["train", "-m", "demo", "--data_dir", str(data), "--n_images", "5", "--print_config"]) == 0
    assert "--n_images: ignored, being of pictures that a run draws itself" in caplog.text
    assert "width = 64" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sizes 64", "--sizes '64': give WIDTHxHEIGHT in px"),
        ("--sizes 64x64,64x64", "64x64 is there twice"),
        ("--sizes 64x60", "height 60 px: model demo needs a positive multiple of 8"),
        ("--sizes 64x64,64x72,64x80", "--n_held_out is 2, but must be at least 3: one for each size"),
        ("-n 0", "--n_images is 0"),
        ("--unconditional 1.5", "--unconditional is 1.5"),
        ("--guidance nan", "--guidance is nan"),
        ("--seed -1", "--seed is -1"),
        ("-m no-such", "model no-such not found"),
        ("--prompts p.txt --images empty", "--prompts and --images exclude each other"),
        ("--prompts no-such.txt", "prompts file no-such.txt"),
        ("--images no-such", "images folder no-such: No such file"),
        ("--images empty", "images folder empty: holds no png"),
        ("--images bare", "images folder bare: 01.png has no caption in 01.txt beside it"),
        ("--images broken", "cannot be read as an image"),
        ("--images few", "of 2 images, --n_held_out 2 leaves none to learn from"),
    ],
)
def test_bad_requests_print_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("a fox")
    draw_images(tmp_path / "few", [(64, 64)] * 2)
    draw_images(tmp_path / "bare", [(64, 64)] * 3)
    (tmp_path / "bare" / "01.txt").unlink()
    draw_images(tmp_path / "broken", [(64, 64)] * 3)
    (tmp_path / "broken" / "02.png").write_bytes(b"no image at all")
    monkeypatch.setattr("sd_hyena.models.load_pipeline", None)
    assert prepare(tmp_path / "data", *options.split()) == 2
    error = capsys.readouterr().err.removeprefix(
        "sd-hyena: --draw_steps: for drawn pictures only; --images ignores it\n"
    )
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--data_dir none", 2, "data folder none: no manifest.json there: sd-hyena prepare -o none makes one"),
        ("--data_dir foreign", 1, "manifest.json: not the manifest of a prepared folder"),
        ("--data_dir torn", 1, "manifest.json: cannot be read"),
        ("--sizes 64x64,60x64", 2, "width 60 px"),
        ("--sizes 64by64", 2, "give WIDTHxHEIGHT"),
        ("--unconditional -1", 2, "--unconditional is -1.0"),
        ("--operator causal -W 64 -H 64 --sizes 64x64,96x64", 2, "the data have 96x64: raise --width and --height"),
    ],
)
def test_training_on_unusable_data_prints_one_line(tmp_path, monkeypatch, capsys, options, status, message):
    monkeypatch.chdir(tmp_path)
    for name, text in (("foreign", '{"name": "an app"}'), ("torn", '{"format":')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    monkeypatch.setattr("sd_hyena.models.load_pipeline", None)
    assert train(tmp_path / "out", *options.split()) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_image_that_breaks_off_is_named(tmp_path, capsys):
    images = draw_images(tmp_path / "i", [(64, 64)] * 3)
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    image.save(images / "00.jpg")
    torn = (images / "00.jpg").read_bytes()
    (images / "00.jpg").write_bytes(torn[: len(torn) // 2])
    assert prepare(tmp_path / "data", "--images", images, "--draw_steps", 12) == 2
    error = capsys.readouterr().err
    assert f"image {images / '00.jpg'}: cannot be read" in error
