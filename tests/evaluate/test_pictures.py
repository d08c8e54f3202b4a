"""PSNR, SSIM and latent distance against values worked out by hand, and the drawing they are taken from."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sd_hyena import likeness
from sd_hyena.evaluate.pictures import Drawing, compare, detail, draw, latent_distance, psnr, ssim
from sd_hyena.likeness import MAX_PSNR


def grey(value, size=32):
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def noisy(seed, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_psnr_by_hand():
    assert psnr(grey(100), grey(105)) == pytest.approx(10 * np.log10(255**2 / 25))
    assert psnr(grey(0), grey(255)) == pytest.approx(0)
    assert psnr(noisy(0), noisy(0)) == MAX_PSNR


def test_ssim_by_hand():
    # Without variance only the term of the means is left: (2 a b + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 255)^2.
    c1 = (0.01 * 255) ** 2
    assert ssim(grey(100), grey(50)) == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1), rel=1e-6)
    assert ssim(noisy(0), noisy(0)) == pytest.approx(1)
    assert abs(ssim(noisy(0), noisy(1))) < 0.1


@pytest.mark.parametrize("size", [(32, 32), (11, 40), (37, 53)])
def test_ssim_is_that_of_torchmetrics(size):
    from torchmetrics.functional.image import structural_similarity_index_measure

    draw = torch.Generator().manual_seed(0)
    a = torch.rand(3, *size, generator=draw, dtype=torch.float64)
    b = (a + 0.3 * torch.randn(a.shape, generator=draw, dtype=torch.float64)).clamp(0, 1)
    theirs = structural_similarity_index_measure(b[None], a[None], data_range=1.0)
    assert likeness.ssim(a, b) == pytest.approx(theirs.item(), abs=1e-6)


def test_ssim_of_pictures_smaller_than_its_window():
    a = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(0))
    assert likeness.ssim(a, a) == pytest.approx(1)
    assert likeness.ssim(a, 1 - a) < 0.5


def test_latent_distance_by_hand():
    a = torch.tensor([[[1.0, 3.0]], [[10.0, 14.0]]])  # channel means 2 and 12: spread 2 + 8
    assert latent_distance(a, a + 1) == pytest.approx(4 / 10)
    assert latent_distance(a, a.mean((1, 2), keepdim=True).expand_as(a)) == pytest.approx(1)
    assert latent_distance(a, a) == 0


def test_compare_pairs_up_and_averages():
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = Drawing([grey(100), grey(100)], latents, 0.0)
    other = Drawing([grey(100), grey(110)], latents, 0.0)
    figures = compare(reference, other).figures()
    assert figures["psnr_min_db"] == pytest.approx(10 * np.log10(255**2 / 100))
    assert figures["psnr_mean_db"] == pytest.approx((MAX_PSNR + figures["psnr_min_db"]) / 2)
    assert figures["latent_distance_mean"] == 0


def test_pictures_are_decoded_from_the_latents_that_are_kept(pipe):
    """More pictures than one batch holds; each latent, decoded, is its picture."""
    prompts = [f"{n} on the left, red background" for n in ("a frog", "a pig", "a fox", "a panda", "a chick")]
    options = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 5.0}
    drawing = draw(pipe, prompts, range(5), **options)
    assert drawing.latents.shape == (5, pipe.unet.config.in_channels, 8, 8)
    with torch.no_grad():
        pixels = pipe.vae.decode(drawing.latents / pipe.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    got = np.stack([np.asarray(image, dtype=float) for image in drawing.images])
    assert np.abs(expected - got).max() <= 1
    again = draw(pipe, prompts[4:], [4], **options)
    assert torch.allclose(again.latents[0], drawing.latents[4], atol=1e-4)


def test_detail_is_what_a_blur_takes():
    noise = torch.randint(0, 256, (48, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    flat = Image.new("RGB", (48, 48), (90, 120, 30))
    assert detail(flat) == pytest.approx(0, abs=1e-9)
    assert 0 < detail(picture.filter(ImageFilter.GaussianBlur(1))) < 0.2 * detail(picture)
