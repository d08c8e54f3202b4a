"""The bundled teacher: a Stable Diffusion pipeline that draws what it is asked for."""

import random

import numpy as np
import pytest
import torch
from conftest import assert_close, make_unet, run_unet
from demo.ldm_export import export

import sd_hyena
from sd_hyena.demo import architecture, grounds
from sd_hyena.demo.local_heads import REACH, SHARE, plant_local_heads
from sd_hyena.demo.patch_encoder import principal_components, set_encoder, start_decoder
from sd_hyena.demo.render import FONT, render
from sd_hyena.demo.scenes import GROUNDS, SUBJECTS, Scene, all_scenes, held_out_scenes, parse_caption, training_prompts
from sd_hyena.demo.scorer import evaluate_scorer, fidelity, load_scorer
from sd_hyena.errors import SdHyenaError, UsageError
from sd_hyena.generate.draw import sample
from sd_hyena.models import DEMO_DIR, fingerprint, load_pipeline, locate
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
    scenes = held_out_scenes(8)
    captions = [s.caption for s in scenes]
    images = sample(demo_pipe, captions, range(50, 58), num_inference_steps=16, guidance_scale=5.0)
    scores = fidelity(load_scorer(DEMO_DIR), images, captions)
    assert scores["ground"] >= 0.75
    assert scores["subject"] >= 0.75
    assert scores["place"] >= 0.75


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


@pytest.mark.parametrize("name", list(GROUNDS))
def test_grounds_are_told_apart_by_more_than_their_phase(name):
    first, again, other = (
        np.asarray(grounds.draw_ground(name, 96, 0.5, np.random.default_rng(seed)), np.float32) for seed in (0, 0, 1)
    )
    assert first.shape == (96, 96, 3)
    assert (first == again).all()
    assert (first != other).any()
    mean = first.mean((0, 1))
    for rival in set(GROUNDS) - {name}:
        drawn = np.asarray(grounds.draw_ground(rival, 96, 0.5, np.random.default_rng(0)), np.float32)
        assert abs(drawn.mean((0, 1)) - mean).max() > 8 or abs(drawn.std() - first.std()) > 4, rival


def test_the_encoder_is_the_principal_components_it_is_made_from():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(6, 3, 9, 9), size=96, mode="bicubic") * 2 - 1
    weight, bias = principal_components([smooth[:4], smooth[4:, :, :64]], architecture.LATENT_CHANNELS)
    vae = architecture.make_vae().eval()
    set_encoder(vae, weight, bias)
    for size in ((96, 96), (40, 88)):
        pixels = smooth[:2, :, : size[0], : size[1]]
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        assert_close("latents", torch.nn.functional.conv2d(pixels, weight, bias, stride=8), posterior.mode(), 5e-3)
        assert posterior.std.max() < 0.01
    latents = torch.cat([torch.nn.functional.conv2d(p, weight, bias, stride=8).flatten(2) for p in smooth.split(1)])
    covariance = torch.cov(latents.transpose(0, 1).flatten(1))
    assert covariance.diagonal().mean() == pytest.approx(1, rel=0.2)
    assert not any(p.requires_grad for p in vae.encoder.parameters())
    start_decoder(vae, weight, bias)
    with torch.no_grad():
        painted = vae.decode(vae.encode(smooth).latent_dist.mode()).sample
    means = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(smooth, 8), scale_factor=8)
    assert_close("mean colours", means, painted, 0.2)


def test_local_heads_are_asked_to_look_around_themselves():
    unet = make_unet(attention_head_dim=2)
    plain = run_unet(unet)
    local = plant_local_heads(unet)
    assert len(local) == 3
    assert torch.allclose(run_unet(unet), plain, atol=1e-5)  # they attend as before
    assert not any(head.loss for head in local)
    for head in local:
        head.active = True
    run_unet(unet)
    y, x = (a.flatten() for a in torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"))
    uniform = (torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) <= REACH).float().mean()
    for head in local:  # an untrained head is nearly uniform
        assert float(head.loss) == pytest.approx(float((SHARE / uniform).log()), rel=0.2)


@pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji, as teacher training does")
def test_renders_and_scorer_agree():
    first = render(Scene("fox", "blue", "left"), random.Random(0))
    again = render(Scene("fox", "blue", "left"), random.Random(0))
    assert (np.asarray(first) == np.asarray(again)).all()
    scores = evaluate_scorer(load_scorer(DEMO_DIR), count=96)
    assert min(scores.values()) >= 0.97


@pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji, as teacher training does")
def test_teacher_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    """The decoder and UNet stages in miniature; a run that is cut off ends like one that is not."""
    from sd_hyena.demo import train

    small = ["--decoder-steps", "2", "--batch-size", "8", "--small-steps", "1", "--large-steps", "2"]
    generator = torch.Generator().manual_seed(0)
    scenes, channels = len(training_prompts()), architecture.LATENT_CHANNELS
    latents = {
        name: torch.randn(scenes, train.VARIATIONS, channels, side, side, generator=generator).half()
        for name, side in (("small", 8), ("large", 16))  # oneDNN miscomputes bfloat16 gradients on fewer
    }
    monkeypatch.setattr(train, "ENCODER_PICTURES", 4)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    update = train._Run.update

    def cut_off(run, loss):
        if run.step == 1:
            raise KeyboardInterrupt
        update(run, loss)

    for folder in "ab":
        train.main(["--work-dir", str(tmp_path / folder), "--stages", "encoder", *small])
        torch.save(latents, tmp_path / folder / "latents.pt")
        for stage in ("decoder", "unet"):
            arguments = ["--work-dir", str(tmp_path / folder), "--stages", stage, *small]
            if folder == "b":
                monkeypatch.setattr(train._Run, "update", cut_off)
                with pytest.raises(KeyboardInterrupt):
                    train.main(arguments)
                monkeypatch.setattr(train._Run, "update", update)
            train.main(arguments)
    for stage, steps in (("decoder", 2), ("unet", 3)):
        a, b = (torch.load(tmp_path / f / f"{stage}.pt", weights_only=True) for f in "ab")
        assert a["step"] == b["step"] == steps
        assert all(torch.equal(x, y) for x, y in zip(a["average"], b["average"], strict=True))
