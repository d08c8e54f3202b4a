"""High resolution in stages, and Hyena in some of the stages and steps: as a user types it."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_sdxl import tiny_sdxl
from torch.nn.modules.module import register_module_forward_pre_hook

from sd_hyena import checkpoint
from sd_hyena.cli import main
from sd_hyena.errors import UsageError
from sd_hyena.generate.hires import pipelines
from sd_hyena.generate.settings import GenerateSettings
from sd_hyena.generate.switching import hyena_range
from sd_hyena.models import DEMO, load_pipeline, locate
from sd_hyena.nn import Operator, OperatorConfig, build
from sd_hyena.patch import attached
from sd_hyena.targets import find_targets

QUICK = ["-m", "demo", "-p", "a frog on the left, red background", *["-W", "64", "-H", "64", "-s", "4", "-k", "7"]]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A file with a random operator for IN01."""
    target = find_targets(load_pipeline(locate(DEMO)).unet)["IN01"]
    torch.manual_seed(0)
    operator = build(OperatorConfig(target.dim, 8, 8, attention_heads=target.heads))
    path = tmp_path_factory.mktemp("students") / "a.safetensors"
    checkpoint.save(path, {"IN01": operator})
    return path


@pytest.fixture
def calls():
    """Of every call of a UNet: the latent's width, and whether a Hyena operator ran in it."""
    found = []

    def note(module, inputs):
        if isinstance(module, UNet2DConditionModel):
            found.append((inputs[0].shape[-1], False))
        elif isinstance(module, Operator):
            found[-1] = (found[-1][0], True)

    handle = register_module_forward_pre_hook(note)
    yield found
    handle.remove()


def generate(folder, *options):
    return main(["generate", *QUICK, "-n", "1", "-o", str(folder), *map(str, options)])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def said(path):
    return Image.open(path).text["parameters"].split("\n")[2]


def runs(found):
    """Runs of equal calls: (width, Hyena, how many)."""
    return [(*key, len(list(group))) for key, group in itertools.groupby(found)]


@pytest.mark.compatibility("High resolution", "`generate --hires`", "works; Hyena at the high size, or with the first")
@pytest.mark.parametrize(
    ("options", "expected", "stages"),
    [
        ((), [(8, False, 4), (16, True, 2)], "hires"),
        (("--hires_hyena", "both"), [(8, True, 4), (16, True, 2)], "native+hires"),
        (("--hires_hyena", "both", "--hyena_above", "64"), [(8, False, 4), (16, True, 2)], "hires"),
        (("--hyena_above", "128"), [(8, False, 4), (16, False, 2)], "none"),
        (("--hires_steps", "3"), [(8, False, 4), (16, True, 3)], "hires"),
    ],
)
def test_hires(tmp_path, student, calls, options, expected, stages):
    hires = ["--hires", "128x128", "--hires_strength", "0.5"]
    assert generate(tmp_path, "-y", student, *hires, *options) == 0
    assert runs(calls) == expected
    path = tmp_path / "image_000.png"
    assert Image.open(path).size == (128, 128)
    steps = expected[-1][2]
    for part in ("Steps: 4,", "Size: 64x64", "Denoising strength: 0.5, Hires resize: 128x128", f"Hires steps: {steps}",
                 f"Hyena stages: {stages}", "Hyena layers: IN01"):  # fmt: skip
        assert part in said(path)


def test_a_hires_picture_depends_on_its_own_seed_alone_and_shows_what_the_native_one_does(tmp_path, student):
    hires = ["--hires", "128x128", "-y", f",{student}"]
    assert generate(tmp_path / "many", "-n", 2, *hires, "-f", "{h}_{n}") == 0
    assert generate(tmp_path / "one", "-k", 8, *hires, "-f", "{h}_{n}") == 0
    assert generate(tmp_path / "native", "-k", 8) == 0
    many, one = (pixels(tmp_path / name) for name in ("many/1_1.png", "one/1_0.png"))
    assert np.abs(many - one).max() <= 2
    attention = pixels(tmp_path / "one" / "0_0.png")
    assert (attention != one).any()
    native = Image.open(tmp_path / "native" / "image_000.png").resize((128, 128), Image.Resampling.LANCZOS)
    apart = [np.square(pixels(tmp_path / "many" / f"0_{n}.png") - np.asarray(native, int)).mean() for n in range(2)]
    assert apart[1] < apart[0] / 2  # it is over that one's picture that it is drawn


@pytest.mark.parametrize("scheduler", ["ddim", "heun", "dpmpp_2m_karras", "pndm"])
def test_the_high_size_with_other_samplers(tmp_path, student, calls, scheduler):
    options = ["--hires", "128x96", "-W", "64", "-H", "48", "--hires_strength", "0.5", "--scheduler", scheduler]
    assert generate(tmp_path, "-s", 8, "-y", student, *options) == 0
    assert Image.open(tmp_path / "image_000.png").size == (128, 96)
    native, high = runs(calls)
    more = {"heun": (15, 7), "pndm": (9, 5)}.get(scheduler, (8, 4))
    assert (native, high) == ((8, False, more[0]), (16, True, more[1]))


@pytest.mark.compatibility(
    "High resolution", "`--hyena_range`", "works with every sampler, several entries and --hires"
)
@pytest.mark.parametrize(
    ("scheduler", "share", "expected"),
    [
        ("model", "0.5-1.0", [(False, 2), (True, 2)]),
        ("model", "0.25-0.75", [(False, 1), (True, 2), (False, 1)]),
        ("euler_a", "0-.5", [(True, 2), (False, 2)]),
        ("heun", "0.25-0.75", [(False, 2), (True, 4), (False, 1)]),  # two calls a step but for the last
        ("pndm", "0.5-1.0", [(False, 3), (True, 2)]),  # one call more than steps
    ],
)
def test_hyena_in_a_share_of_the_steps(tmp_path, student, calls, scheduler, share, expected):
    options = ["--scheduler", scheduler, "--hyena_range", share, "-y", f"{student},", "-i", 2]
    assert generate(tmp_path, *options) == 0
    one = [on for on, count in expected for _ in range(count)]
    assert [on for _, on in calls] == one * 2 + [False] * len(one) * 2  # two pictures with Hyena, two without
    assert f"Hyena range: {share}" in said(tmp_path / "image_000.png")
    assert "Hyena" not in said(tmp_path / "image_002.png")


def test_both_stages_have_their_own_share(tmp_path, student, calls):
    options = ["--hires", "128x128", "--hires_hyena", "both", "--hires_strength", "0.5", "--hyena_range", "0.5-1"]
    assert generate(tmp_path, "-y", student, *options) == 0
    assert runs(calls) == [(8, False, 2), (8, True, 2), (16, False, 1), (16, True, 1)]


@pytest.mark.compatibility(
    "High resolution", "`--hyena_above`", "attention draws pictures whose longer side is not above"
)
def test_hyena_above_a_size(tmp_path, student, calls, caplog):
    for name, size, above in (("small", 64, 64), ("wide", 72, 64)):
        assert generate(tmp_path / name, "-W", size, "-y", student, "--hyena_above", above) == 0
    assert runs(calls) == [(8, False, 4), (9, True, 4)]
    assert caplog.text.count("no picture is larger than 64 px: attention draws them all") == 1
    assert "Hyena stages: none" in said(tmp_path / "small" / "image_000.png")
    assert generate(tmp_path / "plain") == 0
    assert (pixels(tmp_path / "plain" / "image_000.png") == pixels(tmp_path / "small" / "image_000.png")).all()


def test_a_share_of_the_steps_in_python(pipe, student, calls):
    import sd_hyena

    sd_hyena.load_hyena(pipe, student)
    with hyena_range(pipe, 0.5, 1.0):
        for steps in (2, 4):
            pipe("a frog", width=64, height=64, num_inference_steps=steps, output_type="latent")
    assert [on for _, on in calls] == [False, True, False, False, True, True]
    assert all(layer.enabled for layer in attached(pipe.unet).values())
    pipe("a frog", width=64, height=64, num_inference_steps=1, output_type="latent")
    assert calls[-1] == (8, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hires", "big"], "--hires 'big' must be a size in px such as 2048x2048"),
        (["--hires", "64x64"], "must be larger than 64x64"),
        (["--hires", "128x32"], "must be larger than 64x64"),
        (["--hires", "128x256"], "of another shape than 64x64: give 128x128"),
        (["--hires", "100x100"], "such as 96"),
        (["--hires", "128x128", "--hires_strength", "1.5"], "--hires_strength is 1.5"),
        (["--hires", "128x128", "--hires_strength", "0.1"], "leaves none of 4 steps: give --hires_steps"),
        (["--hires", "128x128", "--hires_steps", "-1"], "--hires_steps is -1"),
        (["--hires", "128x128", "--hires_steps", "600"], "1500 steps are too many: the model was taught on 1000"),
        (["--hires_steps", "3"], "are about a high size: give --hires WxH"),
        (["--hyena_range", "0.2-1"], "are about Hyena layers: give some with -y/--hyena"),
        (["--hyena_above", "-1"], "--hyena_above is -1"),
        (["--hyena_range", "1-0"], "two shares of the steps, such as 0.2-1.0"),
        (["--hyena_range", "0.2"], "two shares of the steps"),
        (["--hyena_range", "0.3-0.4"], "--hyena_range 0.3-0.4 holds none of the 4 native steps"),
        (["-s", "1001"], "--steps: 1001 steps are too many: the model was taught on 1000"),
        (["-s", "51", "--scheduler", "lcm"], "51 steps are too many: sampler lcm draws in 50"),
        (["--offload", "model"], "--offload model keeps weights off a GPU, and this runs on the CPU"),
    ],
)
def test_bad_requests_print_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr("sd_hyena.models.load_pipeline", lambda *args: pytest.fail("the model was loaded"))
    assert generate(tmp_path / "images", "--device", "cpu", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "images").exists()


@pytest.mark.compatibility("Samplers", "more steps than the model has timesteps", "refused before loading")
def test_a_folder_says_how_many_steps_there_are(tmp_path, monkeypatch, capsys):
    import json
    import shutil

    from sd_hyena.models import DEMO_DIR

    folder = tmp_path / "model"
    shutil.copytree(DEMO_DIR, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 100}))
    assert main(["generate", *QUICK, "-m", str(folder), "-s", "101", "-o", str(tmp_path)]) == 2
    assert "101 steps are too many: the model was taught on 100" in capsys.readouterr().err


def test_hires_of_sdxl(tmp_path, calls):
    pipe = tiny_sdxl()
    pipe.save_pretrained(tmp_path / "xl")
    target = next(iter(find_targets(pipe.unet).values()))
    torch.manual_seed(0)
    operator = build(OperatorConfig(target.dim, 4, 4, attention_heads=target.heads))
    checkpoint.save(tmp_path / "a.safetensors", {target.name: operator})
    options = ["--hires", "128x128", "--hires_strength", "0.5", "-y", str(tmp_path / "a.safetensors")]
    assert generate(tmp_path, "-m", tmp_path / "xl", *options) == 0
    assert runs(calls) == [(8, False, 4), (16, True, 2)]
    assert Image.open(tmp_path / "image_000.png").size == (128, 128)


def test_a_pipeline_that_draws_over_no_picture_is_refused(tmp_path, capsys):
    pipe = tiny_sdxl()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UsageError, match="--hires: StableDiffusionXLPipeline has no form that draws over a picture"):
        pipelines(pipe, GenerateSettings("xl", "-", width=64, height=64, hires="128x128"))


def test_a_range_leaves_off_what_is_off(pipe):
    import sd_hyena

    first, *others = sd_hyena.load_hyena(pipe, "demo", "high")
    sd_hyena.set_hyena_enabled(pipe, False, first)
    seen = []
    handle = pipe.unet.register_forward_hook(
        lambda *_: seen.append([name for name, layer in sd_hyena.attached(pipe).items() if layer.enabled])
    )
    with sd_hyena.hyena_range(pipe, 0.5, 1.0):
        pipe("a fox", width=64, height=64, num_inference_steps=4, output_type="latent")
    handle.remove()
    assert seen == [[], [], others, others]
    assert [name for name, layer in sd_hyena.attached(pipe).items() if layer.enabled] == others
