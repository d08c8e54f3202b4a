"""A picture by attention and by Hyena layers, and what the page is told of both; no page, no browser."""

import dataclasses
import io
import threading

import numpy as np
import pytest
from PIL import Image

from sd_hyena import compare, patch
from sd_hyena.cli import main
from sd_hyena.compare import Cancelled, Comparison, Picture, Studio
from sd_hyena.errors import CheckpointError, UsageError
from sd_hyena.likeness import MAX_PSNR

SMALL = {"prompt": "a frog on the left, red background", "width": 64, "height": 64, "steps": 2, "seed": 7}
LAYERS = ["IN01", "OUT11"]


@pytest.fixture
def studio(pipe):
    return Studio(pipe, "demo")


def compared(studio, progress=compare._no_progress, layers=LAYERS, **changes):
    teacher, found = studio.compare(studio.settings(**SMALL | changes), "demo", layers, progress)
    assert isinstance(teacher, Picture)
    assert isinstance(found, Comparison)
    assert found.teacher is teacher
    return found


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=int)


def test_both_pictures_are_those_of_generate(studio, tmp_path):
    found = compared(studio)
    words = ["-m", "demo", "-p", SMALL["prompt"], "-W", "64", "-H", "64", "-s", "2", "-k", "7", "-n", "1"]
    assert main(["generate", *words, "-y", ",demo", "-t", "IN01,OUT11", "-f", "{h}", "-o", str(tmp_path)]) == 0
    for file, picture in (("0.png", found.teacher), ("1.png", found.student)):
        written, ours = Image.open(tmp_path / file), Image.open(io.BytesIO(picture.png()))
        assert ours.text == written.text == {"parameters": picture.parameters}
        assert (pixels(ours) == pixels(written)).all()
    assert "Hyena layers: IN01 OUT11" in found.student.parameters


def test_figures(studio):
    found = compared(studio)
    assert 10 < found.psnr < MAX_PSNR
    assert 0.3 < found.ssim < 1
    for picture in (found.teacher, found.student):
        assert picture.seconds > 2 * picture.step_ms / 1000 / 2 > 0
        assert picture.peak_bytes > 1 << 20
    assert found.ratio == found.teacher.seconds / found.student.seconds
    assert patch.attached(studio.pipe.unet) == {}


def test_the_teacher_is_kept_while_only_the_student_changes(studio):
    told = []
    first = compared(studio, lambda *step: told.append(step))
    assert told == [("attention", 1, 2), ("attention", 2, 2), ("Hyena", 1, 2), ("Hyena", 2, 2)]
    told.clear()
    second = compared(studio, lambda *step: told.append(step), layers=["M00"])
    assert {who for who, _, _ in told} == {"Hyena"}
    assert second.teacher is first.teacher
    assert (pixels(second.student.image) != pixels(first.student.image)).any()
    third = compared(studio, lambda *step: told.append(step), seed=8)
    assert third.teacher is not first.teacher


def test_steps_of_a_sampler_that_calls_twice(studio):
    told = []
    compared(studio, lambda *step: told.append(step), scheduler="heun", steps=3)
    assert [step for step in told if step[0] == "Hyena"][-1] == ("Hyena", 3, 3)
    assert max(done for _, done, _ in told) == 3
    assert compared(studio).teacher.parameters.count("Sampler: DDIM") == 1  # the model's own is back


def test_a_drawing_that_nobody_waits_for_makes_way(studio):
    told, failed = threading.Event(), []

    def draw():
        try:
            compared(studio, lambda *step: told.set(), steps=500)
        except Cancelled as error:
            failed.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    assert told.wait(60)
    studio.start()
    assert compared(studio).psnr > 10
    thread.join(60)
    assert len(failed) == 1


@pytest.mark.parametrize("who", ["attention", "Hyena"])
def test_cancelling(studio, who):
    def cancel(drawer, done, total):
        if (drawer, done) == (who, 1):
            studio.cancel()

    with pytest.raises(Cancelled, match=f"cancelled: {who}, step 2 of 3"):
        compared(studio, cancel, steps=3)
    assert patch.attached(studio.pipe.unet) == {}
    studio.start()
    assert compared(studio, steps=3).psnr > 10


def test_nothing_is_drawn_before_all_is_checked(studio, tmp_path):
    def drawn(*step):
        pytest.fail("drew")

    settings = studio.settings(**SMALL)
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    for file, layers, error, words in (
        ("demo", [], UsageError, "no layer is chosen"),
        ("demo", ["IN03"], UsageError, "no self-attention layer IN03"),
        (str(tmp_path / "x.safetensors"), LAYERS, CheckpointError, "x.safetensors"),
    ):
        with pytest.raises(error, match=words):
            list(studio.compare(settings, file, layers, drawn))
    assert patch.attached(studio.pipe.unet) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 65}, "width 65 px"),
        ({"width": None}, "width: give a whole number"),
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 1001}, "1001 steps are too many"),
        ({"cfg_scale": "much"}, "cfg_scale: give a number"),
        ({"cfg_scale": float("nan")}, "--cfg_scale is nan"),
        ({"seed": "1" * 5000}, "seed: give a whole number"),
        ({"seed": 2**64}, "--seed is"),
        ({"prompt": "a\0b"}, "control character"),
        ({"prompt": "a" * 10_001}, "10,001 characters long"),
        ({"scheduler": "dpm_fast"}, "dpm_fast"),
    ],
)
def test_what_the_form_may_say(studio, change, words):
    with pytest.raises(UsageError, match=words):
        studio.settings(**SMALL | change)


def test_numbers_may_come_as_text_and_seeds_be_drawn(studio):
    settings = studio.settings(**SMALL | {"steps": "3", "cfg_scale": "4.5", "seed": " 2147483648 "})
    assert (settings.steps, settings.cfg_scale, settings.seed) == (3, 4.5, 2**31)
    assert len({studio.settings(**SMALL | {"seed": -1}).seed for _ in range(3)}) > 1


def test_what_a_file_offers(studio):
    offer = studio.offer("demo")
    assert list(offer.errors) == list(studio.targets)
    assert all(0 < error < 0.2 for error in offer.errors.values())
    assert offer.origin.startswith("16 of 16 layers, states")
    assert offer.origin.endswith("taught by demo, in 300 steps")


def test_a_file_of_another_teacher_says_so(studio, tmp_path):
    from sd_hyena import checkpoint

    file = checkpoint.load("demo")
    file.teacher["attention_sample"] = [9.0] * 64
    checkpoint.write(tmp_path / "x.safetensors", file)
    assert "but by another model" in studio.offer(str(tmp_path / "x.safetensors")).origin


@pytest.mark.parametrize(
    ("student", "words"),
    [(50.0, "Hyena pays at 64 x 64 px: a step takes 50 ms with 1 Hyena layer, 100 ms with attention, 2.00 times"),
     (125.0, "Hyena does not pay at 64 x 64 px"), (102.0, "makes no difference")],
)  # fmt: skip
def test_the_verdict(student, words, studio):
    picture = Picture(Image.new("RGB", (64, 64)), "x", "", 1.0, 100.0, 1)
    other = dataclasses.replace(picture, step_ms=student)
    found = Comparison.of(studio.settings(**SMALL), "demo", ["IN01"], picture, other)
    assert words in found.verdict()
    assert ("draw larger" in found.verdict()) == (student > 100)
    assert (found.psnr, found.ssim) == (MAX_PSNR, pytest.approx(1))
