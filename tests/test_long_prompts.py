"""Prompts of more than 77 tokens: all of a picture's count; where states have one length, what is cut is said."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_sdxl import tiny_sdxl

from sd_hyena import models
from sd_hyena.cli import main
from sd_hyena.evaluate.pictures import draw
from sd_hyena.families import encode_prompt
from sd_hyena.generate.sampling import sample
from sd_hyena.long_prompts import COMMA_REACH, encode_parts, split

ROOM = 75
LONG = ", ".join(
    f"a frog on a {word} stone"
    for word in ["red", "green", "blue", "white", "black", "grey", "gold", "pale", "dark", "wet"]
)
LONGER = f"{LONG}, {LONG}, {LONG}"
OPTIONS = {"width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.fixture(params=["demo", "sdxl"])
def model(request, demo_pipe, sdxl):
    """Pipelines with one text encoder and with two."""
    return demo_pipe if request.param == "demo" else sdxl


@pytest.fixture
def loaded(model, monkeypatch):
    """Has the commands use that pipeline."""
    monkeypatch.setattr(models, "load_pipeline", lambda *options: model)
    return model


def tokens(pipe, text):
    return pipe.tokenizer(text, add_special_tokens=False).input_ids


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def generate(folder, prompt, *options):
    words = ["generate", "-m", "demo", "-W", "64", "-H", "64", "-s", "1", "-k", "7", "-n", "1"]
    assert main([*words, "-p", prompt, "-o", str(folder), *options]) == 0
    return pixels(folder / "image_000.png")


@pytest.mark.compatibility("Prompts and paths", "prompts of more than 77 tokens", "all of it counts, in parts of 75")
def test_what_is_beyond_77_tokens_counts(tmp_path, loaded):
    assert len(tokens(loaded, LONGER)) > 2 * ROOM
    pictures = [generate(tmp_path / ending, f"{LONGER}, {ending}") for ending in ("a fox", "a blue sky")]
    pictures.append(generate(tmp_path / "again", f"{LONGER}, a fox"))
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[0] == pictures[2]).all()
    parameters = Image.open(tmp_path / "a fox" / "image_000.png").text["parameters"]
    assert parameters.startswith(f"{LONGER}, a fox\nNegative prompt:")


def test_negative_prompts_count_too(tmp_path, loaded):
    pictures = [generate(tmp_path / e, "a frog", "-q", f"{LONGER}, {e}") for e in ("a fox", "a blue sky")]
    assert (pictures[0] != pictures[1]).any()
    assert (
        main(
            [
                "generate",
                "-m",
                "demo",
                "-p",
                LONGER,
                *["-c", "0", "-W", "64", "-H", "64", "-s", "1", "-n", "1", "-o"],
                str(tmp_path),
            ]
        )
        == 0
    )


@pytest.mark.parametrize("negatives", [None, ["", "blurry"], ["blurry, " * 60, ""]])
def test_parts_are_encoded_as_the_pipeline_does(model, negatives):
    prompts = [f"{LONGER}, a fox", LONG + ", a bear, a lake, a hill, a moon"]
    parts = [[*split(model, prompt), "", ""][:3] for prompt in prompts]
    unwanted = negatives and [[*split(model, text), "", ""][:3] for text in negatives]
    assert [len(split(model, prompt)) for prompt in prompts] == [3, 2]
    call = encode_parts(model, prompts, negatives, 3)
    for row in range(2):
        states, pooled = [], []
        for number in range(3):
            negative = unwanted and unwanted[row][number]
            with torch.no_grad():
                got = model.encode_prompt(
                    prompt=parts[row][number],
                    negative_prompt=negative,
                    device="cpu",
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=True,
                )
            states.append(got[:2])
            pooled.append(got[2:])
        for name, tensors in zip(("prompt_embeds", "negative_prompt_embeds"), zip(*states, strict=True), strict=True):
            assert call[name].shape[1] == 3 * 77
            assert torch.allclose(call[name][row], torch.cat(tensors, 1)[0], atol=1e-5)
        for name, tensor in zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), pooled[0], strict=False):
            assert torch.allclose(call[name][row], tensor[0], atol=1e-5)
    assert ("pooled_prompt_embeds" in call) == hasattr(model, "text_encoder_2")


def test_a_picture_does_not_depend_on_its_batch(model):
    prompts = ["a frog", f"{LONGER}, a fox", "a bear", f"{LONG}, {LONG}"]
    together = draw(model, prompts, range(4), **OPTIONS)
    for number, prompt in enumerate(prompts):
        alone = draw(model, [prompt], [number], **OPTIONS)
        assert torch.allclose(alone.latents[0], together.latents[number], atol=1e-4)
        difference = np.asarray(alone.images[0], int) - np.asarray(together.images[number], int)
        assert np.abs(difference).max() <= 2


def test_lists_of_options_go_with_their_prompts(demo_pipe):
    from diffusers import AutoPipelineForImage2Image

    pipe = AutoPipelineForImage2Image.from_pipe(demo_pipe)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    options = {"num_inference_steps": 2, "strength": 0.5}
    prompts, unwanted = [f"{LONGER}, a fox", "a bear", LONGER], ["x", "y", "z"]
    together = sample(pipe, prompts, [1, 2, 3], image=pictures, negative_prompt=unwanted, **options)
    for row in range(3):
        alone = sample(
            pipe, [prompts[row]], [row + 1], image=[pictures[row]], negative_prompt=[unwanted[row]], **options
        )
        assert np.abs(np.asarray(alone[0], int) - np.asarray(together[row], int)).max() <= 2


def test_a_short_prompt_is_the_pipelines_own_business(model, monkeypatch):
    """The pipeline gets the text itself."""
    prompt = " ".join(["frog"] * ROOM)
    images = [
        model(prompt, negative_prompt="fox", generator=[torch.Generator().manual_seed(3)], **OPTIONS).images[0],
        sample(model, [prompt], [3], negative_prompt=["fox"], **OPTIONS)[0],
    ]
    assert (np.asarray(images[0]) == np.asarray(images[1])).all()
    monkeypatch.setattr("sd_hyena.generate.sampling.encode_parts", None)
    sample(model, [prompt], [3], negative_prompt=[prompt], **OPTIONS)
    with pytest.raises(TypeError):
        sample(model, [prompt + " frog"], [3], **OPTIONS)


def test_parts_end_at_commas_where_one_is_near(demo_pipe):
    first, second = split(demo_pipe, LONG + ", " + LONG)[:2]
    assert first.endswith("stone,")
    assert second.startswith("a frog")
    far = "word, " + "frog " * 100
    assert [len(tokens(demo_pipe, part)) for part in split(demo_pipe, far)] == [ROOM, 102 - ROOM]
    near = "frog " * (ROOM - 1 - COMMA_REACH) + "frog, " + "toad " * 50
    assert [len(tokens(demo_pipe, part)) for part in split(demo_pipe, near)] == [ROOM - COMMA_REACH + 1, 50]
    assert [len(tokens(demo_pipe, part)) for part in split(demo_pipe, near[5:])] == [ROOM - COMMA_REACH, 50]
    assert [len(tokens(demo_pipe, part)) for part in split(demo_pipe, near[10:])] == [ROOM, 49 - COMMA_REACH]


WORDS = st.sampled_from(["frog", "fox,", "a", "red;", "x" * 40, "café", "猫が好き、", "1234567890", "\n", "🦊"])
ODD = st.text(st.characters(exclude_categories=["Cs"]), max_size=400)


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(WORDS, max_size=250).map(" ".join) | ODD | st.sampled_from(["猫", "ab1!"]).map(lambda t: t * 99))
def test_every_part_fits_and_nothing_is_lost(demo_pipe, prompt):
    parts = split(demo_pipe, prompt)
    assert "".join("".join(parts).split()) == "".join(prompt.split())
    if len(tokens(demo_pipe, prompt)) <= ROOM:
        assert parts == [prompt]
    else:
        assert len(parts) > 1
        assert all(0 < len(tokens(demo_pipe, part)) <= ROOM for part in parts)


def test_embeddings_of_textual_inversion_count_by_their_vectors(tmp_path):
    pipe = models.load_pipeline(models.locate("demo"))
    width = pipe.text_encoder.config.hidden_size
    vectors = torch.randn(10, width, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<toad>": vectors}, token="<toad>")
    for number in (7, 8):
        text = " ".join(["<toad>"] * number)
        parts = split(pipe, text)
        assert len(parts) == (1 if number == 7 else 2)
        assert " ".join(parts) == text
    states = encode_parts(pipe, [" ".join(["<toad>"] * 8)], None, 2)["prompt_embeds"]
    assert not torch.allclose(states[:, 77 + 1], encode_parts(pipe, ["", ""], None, 1)["prompt_embeds"][:1, 1])


def test_what_is_cut_from_states_of_one_length_is_said_once(model, caplog):
    prompt = type(model).__name__ + " frog," * 40 + " a Fox at the End"  # another one for each model
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            states = encode_prompt(model, prompt)[0]
            encode_prompt(model, "a short one")
    assert states.shape[1] == 77
    (message,) = caplog.messages
    assert message.startswith(f"prompt '{prompt[:60]}...': its first 75")
    assert "its first 75 tokens alone count here, not: frog, frog," in message
    assert message.endswith("a Fox at the End")
    assert "\n" not in message


def test_a_captions_end_is_named_when_data_are_prepared(tmp_path, caplog, demo_pipe, monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", lambda *options: demo_pipe)
    (tmp_path / "p.txt").write_text("toad, " * 50 + "the last of words\n")
    small = ["-m", "demo", "--sizes", "64x64", "-n", "20", "--n_held_out", "1", "--draw_steps", "1", "--prompts"]
    assert main(["prepare", *small, str(tmp_path / "p.txt"), "-o", str(tmp_path / "data")]) == 0
    assert [message.endswith("the last of words") for message in caplog.messages] == [True]


def test_evaluation_draws_all_of_it(tmp_path, demo_pipe):
    one, other = (draw(demo_pipe, [f"{LONGER}, {e}"], [1], **OPTIONS).latents for e in ("a fox", "a blue sky"))
    assert not torch.equal(one, other)
