"""The bundled teacher: a Stable Diffusion pipeline that draws what it is asked for."""

import numpy as np
import pytest
import torch
from demo.ldm_export import export

import sd_hyena
from sd_hyena.demo.scenes import GROUNDS, SUBJECTS, all_scenes, held_out_scenes, parse_caption, training_prompts
from sd_hyena.demo.scorer import fidelity, load_scorer
from sd_hyena.errors import SdHyenaError, UsageError
from sd_hyena.fingerprint import fingerprint
from sd_hyena.generate.sampling import sample
from sd_hyena.models import DEMO_DIR, load_pipeline, locate
from sd_hyena.targets import find_targets


def test_it_is_small_and_has_sd1s_shape(demo_pipe):
    size = sum(p.stat().st_size for p in DEMO_DIR.rglob("*") if p.is_file())
    assert size <= 40e6
    assert type(demo_pipe).__name__ == "StableDiffusionPipeline"
    assert len(sd_hyena.list_targets(demo_pipe)) == 16
    assert demo_pipe.vae_scale_factor == 8
    assert demo_pipe.unet.config.sample_size == 32
    finest = [demo_pipe.unet.get_submodule(find_targets(demo_pipe.unet)[name].path) for name in ("IN01", "OUT11")]
    assert all(attention.inner_dim // attention.heads == 32 for attention in finest)


def test_held_out_combinations_never_occur_in_training():
    held = {(s.subject, s.ground) for s in all_scenes() if s.held_out}
    trained = {(s.subject, s.ground) for s in map(parse_caption, training_prompts())}
    assert len(held) == 34
    assert not held & trained
    assert len(trained) == len(SUBJECTS) * len(GROUNDS) - 34
    prompts = held_out_scenes(16)
    assert len(set(prompts)) == 16
    assert all(s.held_out for s in prompts)
    assert parse_caption(prompts[3].caption) == prompts[3]
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption("a dog")


def test_prompts_steer_what_it_draws(demo_pipe):
    """A small sample of what the model card measures in full."""
    captions = [scene.caption for scene in held_out_scenes(4)]
    images = sample(demo_pipe, captions, range(50, 54), num_inference_steps=10, guidance_scale=5.0)
    scores = fidelity(load_scorer(DEMO_DIR), images, captions)
    assert set(scores.values()) == {1.0}


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
    with pytest.raises(SdHyenaError, match=r"x\.ckpt: asks to run code of its own"):
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
