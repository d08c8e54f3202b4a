"""How the bundled teacher is made: its pictures, what is built in and not learned, and that training resumes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, make_unet, run_unet

from sd_hyena.demo.scenes import GROUNDS, SUBJECTS, Scene, training_prompts
from sd_hyena.demo.scorer import load_scorer
from sd_hyena.models import DEMO_DIR


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "teacher")


@pytest.fixture
def font():
    from render import FONT

    if not FONT.exists():
        pytest.skip("needs Debian's fonts-noto-color-emoji, as teacher training does")


@pytest.mark.parametrize("name", list(GROUNDS))
def test_grounds_are_told_apart_by_more_than_their_phase(name):
    from grounds import draw_ground

    first, again, other = (
        np.asarray(draw_ground(name, 96, 0.5, np.random.default_rng(seed)), np.float32) for seed in (0, 0, 1)
    )
    assert first.shape == (96, 96, 3)
    assert (first == again).all()
    assert (first != other).any()
    mean = first.mean((0, 1))
    for rival in set(GROUNDS) - {name}:
        drawn = np.asarray(draw_ground(rival, 96, 0.5, np.random.default_rng(0)), np.float32)
        assert abs(drawn.mean((0, 1)) - mean).max() > 8 or abs(drawn.std() - first.std()) > 4, rival


def test_the_encoder_is_the_principal_components_it_is_made_from():
    import architecture
    from patch_encoder import principal_components, set_encoder, start_decoder

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
    from local_heads import REACH, SHARE, plant_local_heads

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


@pytest.mark.usefixtures("font")
def test_renders_and_scorer_agree():
    from render import CHARACTERS, render
    from scorer_training import evaluate_scorer

    assert set(CHARACTERS) == set(SUBJECTS)
    first = render(Scene("fox", "blue", "left"), random.Random(0))
    again = render(Scene("fox", "blue", "left"), random.Random(0))
    assert (np.asarray(first) == np.asarray(again)).all()
    scores = evaluate_scorer(load_scorer(DEMO_DIR), count=96)
    assert min(scores.values()) >= 0.97


@pytest.mark.usefixtures("font")
def test_teacher_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    """The decoder and UNet stages in miniature; a run that is cut off ends like one that is not."""
    import architecture
    import train

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
