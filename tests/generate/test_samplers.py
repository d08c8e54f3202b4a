"""Every sampler at any number of steps, on every schedule a model may have: the picture is right, not merely finite."""

import inspect
import itertools
import logging
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from sd_hyena.cli import main
from sd_hyena.errors import UsageError
from sd_hyena.generate.samplers import SCHEDULERS, use_scheduler, with_usable_scheduler
from sd_hyena.generate.sampling import sample

MEAN, STD = 0.7, 0.5  # of the pictures that the exact denoiser knows
STEPS = (1, 2, 20, 30, 50, 100)
RANDOM = {"ddpm", "euler_a", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm"}
AT_MOST_50 = {"lcm", "tcd"}
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SPACINGS = [("scaled_linear", "trailing"), ("scaled_linear", "leading"), ("scaled_linear", "linspace"),
            ("linear", "trailing")]  # fmt: skip
SCHEDULES = list(itertools.product(SPACINGS, ("epsilon", "v_prediction"), (True, False)))


def model(betas="scaled_linear", spacing="trailing", kind="DDIMScheduler", **choices):
    """Something with a scheduler, as a model has one, and the signal of its timesteps, squared."""
    start, end = BETAS[betas]
    own = getattr(diffusers, kind)(
        beta_start=start, beta_end=end, beta_schedule=betas, timestep_spacing=spacing, steps_offset=1, **choices
    )
    return SimpleNamespace(scheduler=own), own.alphas_cumprod.double()


def draw(pipe, signal, noise):
    """What the sampler makes of the noise with the exact denoiser of independent Gaussians."""
    scheduler = pipe.scheduler
    given = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(1)} if "generator" in given else {}
    options |= {"eta": 0.0} if "eta" in given else {}  # as pipelines do
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        low = min(int(t), len(signal) - 1)
        a = torch.lerp(signal[low], signal[min(low + 1, len(signal) - 1)], float(t) - int(t)).item()
        seen = scheduler.scale_model_input(x, t)
        picture = MEAN + a**0.5 * STD**2 / (a * STD**2 + 1 - a) * (seen - a**0.5 * MEAN)
        epsilon = (seen - a**0.5 * picture) / (1 - a) ** 0.5
        v = a**0.5 * epsilon - (1 - a) ** 0.5 * picture
        predicted = v if scheduler.config.prediction_type == "v_prediction" else epsilon
        x = scheduler.step(predicted, t, x, **options).prev_sample
    return x


def answer(signal, noise):
    """Where the probability flow leads from the noise."""
    a = signal[-1].item()
    return MEAN + STD * (noise - a**0.5 * MEAN) / (a * STD**2 + 1 - a) ** 0.5


@pytest.mark.compatibility(
    "Samplers", "every sampler at 1, 2, 20, 30, 50, 100 steps, on every schedule", "right for an exact denoiser"
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_on_every_schedule(name):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()
    for (betas, spacing), prediction, zero_snr in SCHEDULES:
        choices = {"clip_sample": False, "set_alpha_to_one": False}
        choices |= {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
        for steps in STEPS:
            if name in AT_MOST_50 and steps > 50:
                continue
            pipe, signal = model(betas, spacing, **choices)
            use_scheduler(pipe, name, steps)
            pipe.scheduler.set_timesteps(steps)
            drawn = draw(pipe, signal, noise)
            case = f"{name}, {steps} steps, {betas}, {spacing}, {prediction}, zero SNR {zero_snr}"
            assert drawn.isfinite().all(), case
            error = (drawn - answer(signal, noise)).square().mean().sqrt().item()
            mean, std = drawn.mean().item(), drawn.std().item()
            if name == "pndm" and zero_snr and prediction == "epsilon":
                continue  # it extrapolates from the noise predicted first, which says nothing of the picture
            if steps >= 20 and name not in RANDOM:
                assert error < {20: 0.08, 30: 0.06, 50: 0.04, 100: 0.025}[steps], f"{case}: {error}"
            elif steps >= 20:
                assert abs(mean - MEAN) < 0.06, f"{case}: {mean}"
                assert (0.25 if name == "lcm" else 0.36) < std < 0.62, f"{case}: {std}"
            elif steps == 2 and not (name in ("heun", "pndm") or (zero_snr and prediction == "epsilon")):
                assert abs(mean - MEAN) < 0.15, f"{case}: {mean}"
                assert std < 0.6, f"{case}: {std}"
            elif steps == 1 and not (zero_snr and prediction == "epsilon"):  # from that, nothing can be told
                assert abs(mean - MEAN) < 0.06, f"{case}: {mean}"
                assert std < 0.15, f"{case}: {std}"


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc"])
def test_many_steps_where_the_last_two_timesteps_have_almost_no_signal(name):
    pipe, signal = model("linear", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    use_scheduler(pipe, name, 1000)
    pipe.scheduler.set_timesteps(1000)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (draw(pipe, signal, noise) - answer(signal, noise)).square().mean() < 1e-4


@pytest.mark.compatibility("Samplers", "a sampler by name", "is that sampler; a line says what it takes from the model")
def test_what_a_sampler_takes_from_the_model_is_said_and_nothing_else_is_taken(caplog):
    caplog.set_level(logging.INFO, "sd_hyena")
    pipe, _ = model(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    use_scheduler(pipe, "dpmpp_2m", 20)
    assert caplog.messages == [
        "sampler dpmpp_2m: v-prediction, zero terminal SNR, scaled_linear betas, trailing steps, from the model"
    ]
    odd = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}
    pipe, _ = model(kind="DPMSolverMultistepScheduler", **odd, solver_order=3)
    for name in ("euler", "dpmpp_2m"):
        use_scheduler(pipe, name, 20)
        plain = type(pipe.scheduler)().config
        assert all(pipe.scheduler.config[key] == plain[key] for key in (*odd, "solver_order") if key in plain)


def test_latents_are_never_clipped_unless_the_model_says_so():
    """Stable Diffusion 1's own sampler has no word on it, and others clip by default."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in ("ddim", "ddpm"):
        pipe, signal = model(kind="PNDMScheduler", spacing="leading")
        use_scheduler(pipe, name, 50)
        pipe.scheduler.set_timesteps(50)
        assert draw(pipe, signal, noise).max() > 1.5
    pipe, _ = model(clip_sample=True)
    use_scheduler(pipe, "ddpm", 50)
    assert pipe.scheduler.config.clip_sample


def test_the_models_own_is_left_alone_unless_it_would_fail(caplog):
    caplog.set_level(logging.INFO, "sd_hyena")
    pipe, _ = model(spacing="leading")
    own = pipe.scheduler
    for steps in (2, 30):
        use_scheduler(pipe, "model", steps)
        assert pipe.scheduler is own
    assert [m for m in caplog.messages if "begin at timestep 501" in m]
    use_scheduler(pipe, "model", 1000)  # the first timestep would be 1000, of 0 to 999
    pipe.scheduler.set_timesteps(1000)
    assert pipe.scheduler.timesteps.max() == 999
    pipe, signal = model(kind="PNDMScheduler", prediction_type="v_prediction")
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True)  # as from a folder: it takes no notice of that
    use_scheduler(pipe, "model", 30)
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-7 < signal[-1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "TCDScheduler"]
)
def test_the_models_own_draws_where_the_noise_ends_in_pure_noise(kind, prediction):
    pipe, signal = model(kind=kind, prediction_type=prediction, rescale_betas_zero_snr=True)
    if "clip_sample" in pipe.scheduler.config:
        pipe.scheduler.register_to_config(clip_sample=False)
    use_scheduler(pipe, "model", 30)
    pipe.scheduler.set_timesteps(30)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert draw(pipe, signal, noise).isfinite().all()
    before = pipe.scheduler
    assert with_usable_scheduler(pipe).scheduler is before


@pytest.mark.compatibility(
    "Samplers", "zero terminal SNR with epsilon, and the model's own sampler, in every command that draws", "works"
)
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "-p", "a fox", "-W", 64, "-H", 64, "-s", 2, "-n", 1],
        ["prepare", "--sizes", "64x64", "-n", 1, "--n_held_out", 1, "-b", 2, "--draw_steps", 2],
        ["evaluate", "-y", "demo", "-n", 1, "-W", 64, "-H", 64, "-s", 2, "--layer_samples", 0, "--no_yardstick"],
    ],
    ids=lambda words: words[0],
)
def test_commands_draw_where_epsilon_meets_pure_noise(words, tmp_path):
    out = ["-o", tmp_path / "out", "--device", "cpu", "--prediction_type", "epsilon"]
    assert main([words[0], "-m", "demo", *map(str, [*words[1:], *out])]) == 0


def test_steps_that_leave_noise_are_told(caplog):
    pipe, _ = model()
    use_scheduler(pipe, "ddim", 150)
    assert "take 142 or 166" in caplog.text


def test_a_model_without_betas_or_with_too_few_steps_is_refused():
    pipe, _ = model(num_train_timesteps=100)
    for name in ("model", "euler"):
        with pytest.raises(UsageError, match="101 steps are too many: the model was taught on 100"):
            use_scheduler(pipe, name, 101)
    pipe = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler, has no betas"):
        use_scheduler(pipe, "euler", 20)


@pytest.mark.compatibility("Samplers", "on the bundled model, deterministic samplers", "as ddim with more steps")
def test_deterministic_samplers_agree_on_the_bundled_model(pipe):
    own, pictures = pipe.scheduler, {}
    options = {"width": 64, "height": 64, "guidance_scale": 1.0}
    try:
        for name in ("model", *(name for name in SCHEDULERS if name not in {*RANDOM, "ddim"})):
            pipe.scheduler, steps = own, 60 if name == "model" else 25
            use_scheduler(pipe, name, steps)
            (image,) = sample(pipe, ["a red apple on a table"], [7], num_inference_steps=steps, **options)
            pictures[name] = np.asarray(image, dtype=float)
    finally:
        pipe.scheduler = own
    reference = pictures.pop("model")
    psnr = {name: 10 * np.log10(255**2 / np.square(p - reference).mean()) for name, p in pictures.items()}
    assert min(psnr.values()) > 25, psnr
