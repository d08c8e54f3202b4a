"""Prepared data as training sees them: buckets, batches, prompts; and images on their way to latents."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sd_hyena.distill.data import Bucket, Dataset, TeacherInputs, open_prepared
from sd_hyena.distill.encode import encode, nearest_size, read_image
from sd_hyena.distill.lessons import NoiseLessons, PictureLessons
from sd_hyena.distill.manifest import Manifest
from sd_hyena.distill.plan import plan_drawings
from sd_hyena.distill.prepare import prepare
from sd_hyena.distill.prepare_settings import PrepareSettings
from sd_hyena.distill.prompts import CaptionedImage
from sd_hyena.fingerprint import fingerprint
from sd_hyena.targets import find_targets

PROMPTS = ["a fox on the left, green background", "two pigs, red background", "a panda at the top, blue background"]


def prepared(folder, pipe, **changes):
    settings = PrepareSettings("demo", n_images=9, n_held_out=4, draw_steps=1, sizes="64x64", **changes)
    prepare(plan_drawings(settings, pipe, fingerprint(pipe), PROMPTS), folder, pipe)
    return open_prepared(folder)


@pytest.fixture(scope="module")
def one_size(tmp_path_factory, demo_pipe):
    return prepared(tmp_path_factory.mktemp("one"), demo_pipe)


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory, demo_pipe):
    folder = tmp_path_factory.mktemp("two")
    settings = PrepareSettings("demo", n_images=9, n_held_out=4, draw_steps=1, sizes="96x64,64x64", unconditional=0.5)
    prepare(plan_drawings(settings, demo_pipe, fingerprint(demo_pipe), PROMPTS), folder, demo_pipe)
    return open_prepared(folder)


def test_pictures_are_spread_over_the_sizes(two_sizes, demo_pipe):
    assert [b.size for b in two_sizes.buckets] == [(96, 64), (64, 64)]
    assert [(len(b.training), len(b.validation)) for b in two_sizes.buckets] == [(5, 2), (4, 2)]
    assert two_sizes.latent(two_sizes.buckets[0].training[0]).shape == (demo_pipe.unet.config.in_channels, 8, 12)


def test_a_share_is_drawn_for_the_empty_prompt(two_sizes, one_size):
    for bucket in two_sizes.buckets:
        assert unprompted(two_sizes, bucket.training) == len(bucket.training) // 2
        assert unprompted(two_sizes, bucket.validation) == 1
    assert not unprompted(one_size, one_size.buckets[0].training)  # a tenth of nine


def unprompted(data, items):
    """How many of the items were drawn for the empty prompt."""
    return sum(torch.equal(data.text(item)[0], data.empty_text()[0]) for item in items)


def test_a_picture_follows_from_its_prompt_and_seed(one_size, demo_pipe):
    for number, prompt in ((0, PROMPTS[0]), (1, PROMPTS[7919 % 3])):
        alone = demo_pipe(
            prompt,
            width=64,
            height=64,
            num_inference_steps=1,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
        ).images[0]
        torch.testing.assert_close(one_size.latent((0, number)), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["one_size", "two_sizes"])
def test_a_sample_follows_from_seed_step_and_position(demo_pipe, name, request):
    inputs = TeacherInputs(demo_pipe, request.getfixturevalue(name), seed=5, unconditional=0.3)
    for step in range(4):
        whole, parts = inputs.batch(step, range(4)), [inputs.batch(step, [0, 1]), inputs.batch(step, [2, 3])]
        assert whole.keys() == {"sample", "timestep", "encoder_hidden_states"}
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts]))
    same, other = (TeacherInputs(demo_pipe, inputs.data, seed, 0.3).batch(0, [0]) for seed in (5, 6))
    assert torch.equal(same["sample"], inputs.batch(0, [0])["sample"])
    assert other["sample"].shape != same["sample"].shape or not torch.equal(other["sample"], same["sample"])


def test_a_sample_is_a_latent_with_as_much_noise_as_its_timestep_says(demo_pipe, one_size):
    batch = TeacherInputs(demo_pipe, one_size, seed=5, unconditional=0.3).batch(0, range(8))
    latents = torch.stack([one_size.latent(item) for item in one_size.buckets[0].training])
    for noisy, t in zip(batch["sample"], batch["timestep"], strict=True):
        share = demo_pipe.scheduler.alphas_cumprod[t]
        noise = (noisy - share.sqrt() * latents) / (1 - share).sqrt()
        assert (noise.square().mean((1, 2, 3)) - 1).abs().min() < 0.4  # of one of the latents it is normal noise


def test_every_step_has_one_size_each_as_often_as_it_has_pictures(demo_pipe, two_sizes):
    inputs = TeacherInputs(demo_pipe, two_sizes, seed=0, unconditional=0)
    sizes = [inputs.size(step) for step in range(900)]
    assert set(sizes) == {(8, 12), (8, 8)}
    assert sizes.count((8, 12)) == pytest.approx(500, abs=60)
    for step in range(3):
        for positions in (range(3), [7]):
            assert inputs.batch(step, positions)["sample"].shape[-2:] == sizes[step]


def test_prompts_are_dropped_as_often_as_asked_and_need_no_text_encoder(demo_pipe, two_sizes, monkeypatch):
    own = {prompt: demo_pipe.encode_prompt(prompt, "cpu", 1, False)[0][0] for prompt in ["", *PROMPTS]}
    monkeypatch.setattr(demo_pipe, "encode_prompt", None)
    always, never, some = (TeacherInputs(demo_pipe, two_sizes, 0, share) for share in (1.0, 0.0, 0.3))
    counts = [0, 0]
    for step in range(40):
        without, whole, dropped = (
            [next(prompt for prompt, own_states in own.items() if torch.equal(own_states, states)) for states in batch]
            for batch in (i.batch(step, range(4))["encoder_hidden_states"] for i in (always, never, some))
        )
        assert without == [""] * 4
        for before, after in zip(whole, dropped, strict=True):
            assert after in (before, "")
            counts[0] += bool(before) and not after
            counts[1] += bool(before)
    assert counts[1] > 50
    assert counts[0] / counts[1] == pytest.approx(0.3, abs=0.12)


def test_held_out_pictures_are_measured_on_and_never_learned_from(demo_pipe, two_sizes, one_size, monkeypatch):
    inputs = TeacherInputs(demo_pipe, two_sizes, seed=0, unconditional=0)
    batches = inputs.validation_batches(7, 2)
    assert sorted(p for b in batches for p in b) == list(range(7))
    shapes = {tuple(inputs.batch(0, b, validation=True)["sample"].shape[-2:]) for b in batches}
    assert shapes == {(8, 12), (8, 8)}
    with pytest.raises(ValueError, match="several sizes"):
        inputs.batch(0, [0, 1], validation=True)
    seen, latent = set(), two_sizes.latent
    monkeypatch.setattr(two_sizes, "latent", lambda item: seen.add(item) or latent(item))
    for step in range(60):
        inputs.batch(step, range(4))
    assert seen == {item for bucket in two_sizes.buckets for item in bucket.training}
    seen.clear()
    for positions in batches:
        inputs.batch(0, positions, validation=True)
    assert seen <= {item for bucket in two_sizes.buckets for item in bucket.validation}
    assert TeacherInputs(demo_pipe, one_size, 0, 0).validation_batches(7, 3) == [range(3), range(3, 6), range(6, 7)]


def test_noise_has_the_grids_of_the_sizes(demo_pipe, two_sizes):
    targets = [t for t in find_targets(demo_pipe.unet).values() if t.name in ("IN01", "IN04")]
    attentions = {t.name: demo_pipe.unet.get_submodule(t.path) for t in targets}
    noise = NoiseLessons(attentions, targets, [(8, 12), (8, 8)], 3)
    real = PictureLessons(demo_pipe, targets, two_sizes, 3, 0.3)

    def shapes(records):
        return {name: (r.size, r.x.shape, r.y.shape) for name, r in records.items()}

    passes = [noise.training(step, [0]) for step in range(20)]
    assert {r["IN01"].size for r in passes} == {(8, 12), (8, 8)}
    pictures = [shapes(real.training(step, [0])) for step in range(5)]
    assert all(shapes(r) in pictures for r in passes)


def test_held_out_noise_is_never_trained_on_and_the_same_for_every_run(demo_pipe):
    targets = [t for t in find_targets(demo_pipe.unet).values() if t.name in ("IN01", "IN04")]
    attentions = {t.name: demo_pipe.unet.get_submodule(t.path) for t in targets}
    first, other = (NoiseLessons(attentions, targets, [(8, 12), (8, 8)], seed) for seed in (3, 4))
    batches = first.held_out_batches(7, 2)
    assert sorted(p for b in batches for p in b) == list(range(7))
    seen = {first.held_out(b)["IN01"].size for b in batches}
    assert seen == {(8, 12), (8, 8)}
    held_out = first.held_out(range(0, 4, 2))
    assert torch.equal(held_out["IN04"].x, other.held_out(range(0, 4, 2))["IN04"].x)
    assert torch.equal(held_out["IN04"].x[1:], first.held_out([2])["IN04"].x)
    assert not torch.equal(first.training(0, [0])["IN01"].x, other.training(0, [0])["IN01"].x)
    trained = [first.training(step, [position])["IN01"].x for step in range(6) for position in range(4)]
    assert not any(torch.equal(x, row[None]) for x in trained for row in held_out["IN01"].x if x[0].shape == row.shape)
    for record in held_out.values():
        assert record.x.mean().abs() < 0.1
        assert 0.9 < record.x.var() < 1.1


def test_pooled_states_and_sizes_reach_a_model_that_takes_them(demo_pipe):
    shard = {
        "latents": torch.randn(3, 4, 8, 12),
        "prompt": torch.tensor([0, 1, 1]),
        "states": torch.randn(2, 5, 6),
        "pooled": torch.randn(2, 7),
    }
    data = Dataset(Manifest({"sizes": [[96, 64]]}, 1), [shard], [Bucket((96, 64), [(0, 1)], [(0, 2)])])
    config = SimpleNamespace(in_channels=4, addition_time_embed_dim=2, projection_class_embeddings_input_dim=7 + 6 * 2)
    pipe = SimpleNamespace(
        unet=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16, config=config),
        scheduler=demo_pipe.scheduler,
        vae_scale_factor=8,
    )
    for share, row in ((0.0, 1), (1.0, 0)):
        batch = TeacherInputs(pipe, data, 0, share).batch(0, range(2))
        added = batch["added_cond_kwargs"]
        assert torch.equal(added["text_embeds"], shard["pooled"][[row, row]].half())
        assert added["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
        assert torch.equal(batch["encoder_hidden_states"], shard["states"][[row, row]].half())
        assert batch["sample"].dtype == torch.float16


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((300, 300), (256, 256)),
        ((100, 100), (128, 128)),
        ((1000, 1000), (512, 512)),
        ((400, 300), (384, 256)),
        ((200, 600), (256, 384)),
    ],
)
def test_an_image_goes_to_the_nearest_aspect_ratio(image, expected):
    sizes = [(256, 256), (384, 256), (128, 128), (512, 512), (256, 384)]
    assert nearest_size(CaptionedImage(Path("x.png"), "", *image), sizes) == expected


def test_an_image_is_scaled_and_cut_about_its_centre(tmp_path):
    image = Image.new("RGB", (120, 40), "red")
    image.paste("blue", (40, 0, 80, 40))
    image.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", (16, 16))
    assert pixels.shape == (3, 16, 16)
    assert (pixels[2] > 0.8).all()
    assert (pixels[:2] < -0.8).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "b.jpg", exif=exif, quality=95)
    assert read_image(tmp_path / "b.jpg", (40, 120))[2, 60].mean() > 0.8  # the middle third is blue
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "c.png")
    assert (read_image(tmp_path / "c.png", (16, 16)) == 1).all()


def test_encoding_undoes_decoding(tmp_path, demo_pipe):
    latents = demo_pipe(
        PROMPTS[0],
        width=256,
        height=256,
        num_inference_steps=8,
        guidance_scale=2.0,  # with more, colours are cut off at black and white
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    with torch.no_grad():
        picture = demo_pipe.vae.decode(latents / demo_pipe.vae.config.scaling_factor).sample
    array = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    again = encode(demo_pipe, [tmp_path / "a.png"], (256, 256))
    assert (again - latents).square().mean() < 0.03 * latents.var()  # 0.011; a constant would be at 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.5}, [1.0, 2.0]),
        ({"scaling_factor": 0.5, "shift_factor": 1.0}, [0.5, 1.5]),
        # Stable Diffusion XL pipelines decode latents * std / scaling_factor + mean.
        ({"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [4.0, 8.0]}, [0.125, 0.125]),
    ],
)
def test_latents_are_scaled_as_each_familys_pipeline_does(tmp_path, config, expected):
    class Vae:
        dtype, device, config = torch.float32, torch.device("cpu"), None

        def to(self, dtype):
            self.dtype = dtype

        def encode(self, pixels):
            assert pixels.shape == (1, 3, 8, 16)
            mean = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean))

    vae = Vae()
    vae.config = SimpleNamespace(**config)
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    assert encode(SimpleNamespace(vae=vae), [tmp_path / "a.png"], (16, 8)).flatten().tolist() == expected
