"""``sd-hyena generate`` and ``info`` as a user types them."""

import json

import numpy as np
import pytest
import torch
from conftest import trained
from PIL import Image

from sd_hyena import checkpoint
from sd_hyena.cli import main
from sd_hyena.demo.scenes import held_out_scenes
from sd_hyena.generate.samplers import SCHEDULERS
from sd_hyena.models import DEMO, load_pipeline, locate
from sd_hyena.nn import OperatorConfig
from sd_hyena.targets import find_targets

QUICK = ["-m", "demo", "-p", "a frog on the left, red background", *["-W", "64", "-H", "64", "-s", "2", "-k", "7"]]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two files with random operators: IN01, and OUT10 with OUT11."""
    folder = tmp_path_factory.mktemp("students")
    unet = load_pipeline(locate(DEMO)).unet
    for file, names in (("a", ["IN01"]), ("b", ["OUT10", "OUT11"])):
        layers = {}
        for name in names:
            target = find_targets(unet)[name]
            config = OperatorConfig(target.dim, 8, 8, attention_heads=target.heads, block=4)
            layers[name] = trained(config, len(layers))
        checkpoint.save(folder / f"{file}.safetensors", layers)
    return folder


def generate(folder, *options):
    return main(["generate", *QUICK, "-o", str(folder), *map(str, options)])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_the_bundled_model_has_something_to_draw(tmp_path, capsys):
    assert main(["generate", "-m", "demo", "-y", "demo", "-W", "64", "-H", "64", "-s", "2", "-o", str(tmp_path)]) == 0
    text = Image.open(tmp_path / "image_003.png").text["parameters"]
    assert text.splitlines()[0] == held_out_scenes(1)[0].caption
    for command, option in (("generate", "-p/--prompt"), ("train", "-m/--teacher_model"), ("prepare", "-m/--teacher")):
        model = ["-m", "x.safetensors"] if command == "generate" else []
        assert main([command, *model]) == 2
        assert capsys.readouterr().err.startswith(f"sd-hyena: {option}")


def test_a_sweep_compares_entries_on_the_same_noise(tmp_path, students):
    a, b = students / "a.safetensors", students / "b.safetensors"
    assert generate(tmp_path, "-n", 2, "-y", f",{a},{a}+{b}", "--grid", "-f", "{h}_{n}") == 0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted([f"{h}_{n}.png" for h in range(3) for n in range(2)] + ["grid.png"])
    teacher, one, both = (pixels(tmp_path / f"{h}_1.png") for h in range(3))
    assert (teacher != one).any()
    assert (one != both).any()
    assert Image.open(tmp_path / "grid.png").size[1] > 3 * 64
    text = Image.open(tmp_path / "2_1.png").text["parameters"].split("\n")
    assert text[0] == "a frog on the left, red background"
    assert text[1].startswith("Negative prompt:")
    for part in (
        "Steps: 2",
        "Sampler: DDIM",
        "CFG scale: 7",
        "Seed: 8",
        "Size: 64x64",
        "Hyena: a.safetensors+b.safetensors",
        "IN01 OUT10 OUT11",
    ):
        assert part in text[2]


def test_default_names_do_not_collide_in_a_sweep(tmp_path, students):
    assert generate(tmp_path, "-n", 2, "-i", 2, "-y", f",{students}/a.safetensors") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"image_{n:03d}.png" for n in range(8)]


def test_an_image_depends_on_its_own_seed_alone(tmp_path):
    assert generate(tmp_path / "many", "-n", 2, "-i", 2) == 0
    assert main(["generate", *QUICK, "-k", "9", "-n", "1", "-o", str(tmp_path / "one")]) == 0
    difference = np.abs(pixels(tmp_path / "many" / "image_002.png") - pixels(tmp_path / "one" / "image_000.png"))
    assert difference.max() <= 2


def test_the_plain_teacher_is_the_pipeline_itself(tmp_path, pipe):
    assert generate(tmp_path, "-n", 1) == 0
    image = pipe(
        "a frog on the left, red background",
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=7.0,
        generator=[torch.Generator().manual_seed(7)],
    ).images[0]
    assert (pixels(tmp_path / "image_000.png") == np.asarray(image)).all()


def test_guidance_works_with_an_empty_negative_prompt_and_can_be_switched_off(tmp_path):
    for name, options in (("guided", ()), ("off", ("-c", 0)), ("negative", ("-q", "red background"))):
        assert generate(tmp_path / name, "-n", 1, *options) == 0
    images = [pixels(tmp_path / name / "image_000.png") for name in ("guided", "off", "negative")]
    assert (images[0] != images[1]).any()
    assert (images[0] != images[2]).any()


def test_target_restricts_the_layers(tmp_path, students):
    assert generate(tmp_path, "-n", 1, "-y", students / "b.safetensors", "-t", "OUT11") == 0
    assert Image.open(tmp_path / "image_000.png").text["parameters"].endswith("Hyena layers: OUT11")


@pytest.mark.compatibility("Samplers", "`dpmpp_2m_karras` on the bundled model at 21 steps", "works")
@pytest.mark.parametrize(("scheduler", "steps"), [*((name, 2) for name in SCHEDULERS), ("dpmpp_2m_karras", 21)])
def test_every_scheduler_draws(tmp_path, caplog, scheduler, steps):
    options = ["-s", str(steps), "-n", "1", "--scheduler", scheduler, "-o", str(tmp_path)]
    assert main(["generate", *QUICK, *options]) == 0
    assert pixels(tmp_path / "image_000.png").std() > 1
    assert caplog.text.count(f"sampler {scheduler}: v-prediction, zero terminal SNR, ") == 1
    text = Image.open(tmp_path / "image_000.png").text["parameters"]
    assert ("Schedule type: Karras" in text) == scheduler.endswith("karras")


@pytest.mark.parametrize("size", [(96, 64), (72, 104), (128, 128), (64, 64)])
def test_scalings_differ_at_all_sizes_but_the_one_taught(tmp_path, students, size):
    drawn = []
    for scaling in ("extend", "stretch"):
        options = ["-W", size[0], "-H", size[1], "-y", students / "a.safetensors", "--scaling", scaling]
        assert generate(tmp_path / scaling, "-n", 1, *options) == 0
        drawn.append(pixels(tmp_path / scaling / "image_000.png"))
    assert drawn[0].shape == (size[1], size[0], 3)
    assert np.array_equal(*drawn) == (size == (64, 64))


def test_bfloat16(tmp_path, students):
    assert generate(tmp_path, "-n", 1, "--dtype", "bfloat16", "-y", students / "a.safetensors") == 0
    assert pixels(tmp_path / "image_000.png").std() > 1


def test_existing_images_are_kept_unless_told_otherwise(tmp_path, capsys):
    (tmp_path / "image_001.png").write_bytes(b"mine")
    assert generate(tmp_path, "-n", 2) == 2
    assert "image_001.png exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["image_001.png"]
    assert generate(tmp_path, "-n", 2, "--overwrite") == 0
    assert (tmp_path / "image_001.png").read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["-f", "../{n}"], 2, "must not leave the output folder"),
        (["-f", "{n.__class__}"], 2, "is not one of them"),
        (["-f", "/tmp/{n}"], 2, "must not leave"),
        (["-f", "x"], 2, "repeats names"),
        (["-f", "{b}", "-i", "2"], 2, "repeats names"),
        (["-f", "n" * 300 + "{n}"], 2, "longer than 200 bytes"),
        (["-W", "0"], 2, "--width is 0"),
        (["-H", "100"], 2, "such as 96"),
        (["-W", "99999992"], 2, "--width is 99999992"),
        (["-c", "-1"], 2, "--cfg_scale is -1"),
        (["-y", "none.safetensors"], 2, "no file none.safetensors"),
        (["-s", "0"], 2, "--steps is 0"),
        (["-t", "IN3"], 2, "'IN3' is not a layer name"),
        (["-y", "damaged.safetensors"], 1, "damaged.safetensors: is cut short or damaged"),
        (["-y", "other.safetensors"], 2, "IN01 has 64 channels, but the operator has 320"),
    ],
)
def test_bad_requests_print_one_line_and_write_nothing(
    tmp_path, monkeypatch, capsys, students, options, status, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.safetensors").write_bytes((students / "a.safetensors").read_bytes()[:-3])
    golden = __file__.rsplit("/", 2)[0] + "/golden/legacy_IN01_64px.safetensors"
    (tmp_path / "other.safetensors").symlink_to(golden)
    assert generate(tmp_path / "images", "-n", 2, *options) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_stacking_files_with_the_same_layer_is_refused(tmp_path, students, capsys):
    a = students / "a.safetensors"
    assert generate(tmp_path, "-y", f"{a}+{a}") == 2
    assert "layer IN01 is in more than one" in capsys.readouterr().err


def test_info(students, capsys):
    assert main(["info", str(students / "b.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "OUT10" in printed
    assert "states" in printed
    assert main(["info", "--json", str(students / "b.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["OUT11"]["config"]["dim"] == 64
    assert main(["info", "nothing.safetensors"]) == 1
