"""What pictures of ours, A1111's and ComfyUI's say of how they were drawn, and what hostile ones may not do."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.errors import UsageError
from sd_hyena.generate.draw import file_hash
from sd_hyena.generate.samplers import SCHEDULERS
from sd_hyena.picture_settings import _SAMPLERS, from_comfy, from_parameters, read_settings

A1111 = """a castle, (stone:1.2),
by a lake: at night
Negative prompt: blurry,
people
Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 4294967296, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5, Lora hashes: "a: 1, Steps: 3", Version: v1.10.1"""
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 2**64 - 1,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a lighthouse\n", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0], "clip": ["4", 1]}},
    "9": {"class_type": "Other", "inputs": {}, "is_changed": [float("nan")]},
}


def png(path, **texts):
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a1111():
    found = from_parameters(A1111)
    assert found.values == {
        "prompt": "a castle, (stone:1.2),\nby a lake: at night",
        "negative_prompt": "blurry,\npeople",
        "steps": 28,
        "cfg_scale": 6.5,
        "seed": 4294967296,
        "width": 512,
        "height": 768,
        "scheduler": "dpmpp_2m_sde_karras",
    }
    assert (found.hyena, found.layers, found.notes) == ("", [], [])


def test_signs_that_are_not_read(tmp_path):
    found = read_settings(png(tmp_path / "x.png", parameters=A1111))
    assert found.notes == ["(stone:1.2): drawn literally, as words: A1111's signs are not read"]


def test_no_negative_prompt_and_a_sampler_of_others():
    found = from_parameters("a cat\nSteps: 5, Sampler: DPM fast, CFG scale: 7, Seed: x")
    assert found.values == {"prompt": "a cat", "negative_prompt": "", "steps": 5, "cfg_scale": 7}
    assert found.notes == ["its sampler 'DPM fast' is none of ours: the form's stays"]


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "dpmpp_2m_karras"])
def test_karras_as_part_of_the_name(name):
    found = from_parameters(f"x\nSteps: 5, Sampler: {name}, CFG scale: 7")
    assert found.values["scheduler"] == "dpmpp_2m_karras"


def test_all_samplers_are_known():
    assert set(_SAMPLERS.values()) | {"dpmpp_2m_karras", "dpmpp_2m_sde_karras"} == set(SCHEDULERS)


def test_ours(tmp_path):
    from sd_hyena.cli import main

    words = [
        "-p",
        "a fox, at: night",
        "-q",
        "red",
        "-W",
        "64",
        "-H",
        "72",
        "-s",
        "2",
        "-c",
        "4.5",
        "-k",
        "9",
        "-n",
        "1",
    ]
    assert main(["generate", "-m", "demo", *words, "-y", "demo", "-t", "IN01,M00", "-o", str(tmp_path)]) == 0
    found = read_settings(tmp_path / "image_000.png")
    assert found.values == {
        "prompt": "a fox, at: night",
        "negative_prompt": "red",
        "steps": 2,
        "cfg_scale": 4.5,
        "seed": 9,
        "width": 64,
        "height": 72,
        "scheduler": "ddim",
    }
    assert (found.hyena, found.hyena_hash, found.layers) == ("demo", file_hash("demo"), ["IN01", "M00"])


def test_comfy(tmp_path):
    found = read_settings(png(tmp_path / "x.png", prompt=json.dumps(COMFY)))
    assert found.values == {
        "prompt": "a lighthouse",
        "seed": 2**64 - 1,
        "steps": 20,
        "cfg_scale": 8.0,
        "width": 512,
        "height": 640,
        "scheduler": "dpmpp_2m_karras",
    }


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"1": 3}', '{"1": {"class_type": 3}}', '{"1": {"class_type": "KSampler", "inputs": []}}',
     '{"1": {"class_type": "KSampler", "inputs": {"seed": true, "positive": [], "negative": [["x"]]}}}'],
)  # fmt: skip
def test_comfy_with_nothing_to_take(text):
    assert from_comfy(text).values == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({}, "says nothing of how it was drawn"),
        ({"parameters": "just: words"}, "says nothing"),
        ({"prompt": "{"}, "ComfyUI prompt cannot be read: line 1"),
        ({"prompt": '{"a":' * 5000}, "cannot be read"),
        ({"parameters": "a" * 10_001 + "\nSteps: 1, Seed: 1, CFG scale: 1"}, "10,001 characters long"),
        ({"parameters": "a\x1b[2J\nSteps: 1, Seed: 1, CFG scale: 1"}, "control character"),
        ({"parameters": "x" * (1 << 22) + "x"}, "says more than 4 MiB"),
    ],
)
def test_refused_in_one_line(tmp_path, texts, words):
    with pytest.raises(UsageError, match=words) as raised:
        read_settings(png(tmp_path / "x.png", **texts))
    assert "\n" not in str(raised.value)


def test_no_picture(tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        read_settings(tmp_path / "x.png")


def test_numbers_are_taken_as_they_stand_unless_they_are_none():
    found = from_parameters("x\nSteps: 99999999999, Seed: 18446744073709551616, CFG scale: 1e9, Size: 0x0")
    assert found.values == {"prompt": "x", "negative_prompt": "", "steps": 99999999999, "width": 0, "height": 0}
    told = {"class_type": "KSampler", "inputs": {"steps": 2.5, "cfg": -1, "seed": 10**299, "sampler_name": "euler"}}
    assert from_comfy(json.dumps({"3": told})).values == {"scheduler": "euler"}
