"""The bundled teacher: a Stable Diffusion pipeline that draws what it is asked for."""

import random

import numpy as np
import pytest
import torch
from demo.ldm_export import export

import sd_hyena
from sd_hyena.demo.render import FONT, render
from sd_hyena.demo.scenes import COLOURS, SUBJECTS, Scene, all_scenes, held_out_scenes, parse_caption, training_prompts
from sd_hyena.demo.scorer import evaluate_scorer, fidelity, load_scorer
from sd_hyena.errors import SdHyenaError, UsageError
from sd_hyena.generate.draw import sample
from sd_hyena.models import DEMO_DIR, fingerprint, load_pipeline, locate


def test_it_is_small_and_has_sd1s_shape(demo_pipe):
    size = sum(p.stat().st_size for p in DEMO_DIR.rglob("*") if p.is_file())
    assert size <= 40e6
    assert type(demo_pipe).__name__ == "StableDiffusionPipeline"
    assert len(sd_hyena.list_targets(demo_pipe)) == 16
    assert demo_pipe.vae_scale_factor == 8
    assert demo_pipe.unet.config.sample_size == 32


def test_held_out_combinations_never_occur_in_training():
    held = {(s.subject, s.colour) for s in all_scenes() if s.held_out}
    trained = {(s.subject, s.colour) for s in map(parse_caption, training_prompts())}
    assert len(held) == 16
    assert not held & trained
    assert len(trained) == len(SUBJECTS) * len(COLOURS) - 16
    prompts = held_out_scenes(16)
    assert len(set(prompts)) == 16
    assert all(s.held_out for s in prompts)
    assert parse_caption(prompts[3].caption) == prompts[3]
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption("a dog")


def test_prompts_steer_what_it_draws(demo_pipe):
    """A small sample of what the model card measures in full."""
    scenes = held_out_scenes(8)
    captions = [s.caption for s in scenes]
    images = sample(demo_pipe, captions, range(50, 58), num_inference_steps=16, guidance_scale=5.0)
    scores = fidelity(load_scorer(DEMO_DIR), images, captions)
    assert scores["colour"] >= 0.75
    assert scores["subject"] >= 0.5
    assert scores["layout"] >= 0.5


def test_single_file_export_draws_the_same_images(tmp_path, demo_pipe):
    path = tmp_path / "teacher.safetensors"
    export(demo_pipe, path)
    single = load_pipeline(locate(str(path)))
    assert fingerprint(single) == fingerprint(demo_pipe)
    options = {"num_inference_steps": 3, "width": 128, "height": 128}
    a, b = (
        np.asarray(sample(p, ["a fox on the left, blue background"], [1], **options)[0]) for p in (demo_pipe, single)
    )
    assert (a == b).all()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_ckpt_is_refused_and_its_payload_never_runs(tmp_path):
    path, mark = tmp_path / "x.ckpt", tmp_path / "ran"
    torch.save({"state_dict": Payload(mark)}, path)
    with pytest.raises(SdHyenaError, match=r"x\.ckpt: cannot be loaded"):
        load_pipeline(locate(str(path)))
    assert not mark.exists()


def test_a_damaged_single_file_is_one_clear_line(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(SdHyenaError, match=r"x\.safetensors"):
        load_pipeline(locate(str(path)))


@pytest.mark.parametrize("name", ["no-such", "missing.safetensors", "a/b/c"])
def test_models_that_do_not_exist(name):
    with pytest.raises(UsageError, match="not found"):
        locate(name)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(UsageError, match=r"no model_index\.json"):
        locate(str(tmp_path))


@pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji, as teacher training does")
def test_renders_and_scorer_agree():
    first = render(Scene("fox", "blue", "left"), random.Random(0))
    again = render(Scene("fox", "blue", "left"), random.Random(0))
    assert (np.asarray(first) == np.asarray(again)).all()
    scores = evaluate_scorer(load_scorer(DEMO_DIR), count=96)
    assert min(scores.values()) >= 0.97


@pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji, as teacher training does")
def test_teacher_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    """The VAE and UNet stages in miniature; a run that is cut off ends like one that is not."""
    from sd_hyena.demo import train

    small = ["--vae-steps", "2", "--batch-size", "2", "--crop-steps", "1", "--scene-steps", "2"]
    generator = torch.Generator().manual_seed(0)
    latents = {"latents": torch.randn(480, 8, 4, 32, 32, generator=generator).half()}
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    update = train._Run.update

    def cut_off(run, loss):
        if run.step == 1:
            raise KeyboardInterrupt
        update(run, loss)

    for folder in "ab":
        for stage in ("vae", "unet"):
            arguments = ["--work-dir", str(tmp_path / folder), "--stages", stage, *small]
            if folder == "b":
                monkeypatch.setattr(train._Run, "update", cut_off)
                with pytest.raises(KeyboardInterrupt):
                    train.main(arguments)
                monkeypatch.setattr(train._Run, "update", update)
            train.main(arguments)
            torch.save(latents | {"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / folder / "latents.pt")
    for stage, steps in (("vae", 2), ("unet", 3)):
        a, b = (torch.load(tmp_path / f / f"{stage}.pt", weights_only=True) for f in "ab")
        assert a["step"] == b["step"] == steps
        assert all(torch.equal(x, y) for x, y in zip(a["average"], b["average"], strict=True))
