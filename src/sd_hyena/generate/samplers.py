"""Samplers by the names of the command line, on the noise schedule of the model. Light until one is made."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import strict_json
from ..errors import UsageError

if TYPE_CHECKING:
    from ..models import ModelSource

logger = logging.getLogger(__name__)

_KARRAS, _SDE = {"use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"}
# name on the command line -> diffusers class and the options that make it
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", _KARRAS),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
_STRIDING = ("DDIMScheduler", "PNDMScheduler")  # they go total // steps timesteps a step, wherever the next one is
_DISTILLED = ("LCMScheduler", "TCDScheduler")  # they draw in the steps their models were taught, and space them so
_EXACT = ("DDIMScheduler", "DDPMScheduler", *_DISTILLED)  # they do with no signal at all, unless noise is predicted
# What belongs to the model, whatever draws with it. All else makes the sampler and is never taken from the model's.
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_MODEL = (*_BETAS, "prediction_type", "rescale_betas_zero_snr", "clip_sample", "clip_sample_range", "thresholding",
          "dynamic_thresholding_ratio", "sample_max_value", "original_inference_steps")  # fmt: skip
_PREFERENCES = ("timestep_spacing", "steps_offset", "set_alpha_to_one")  # the model's if it states them
_PREDICTIONS = {"epsilon": "noise prediction", "v_prediction": "v-prediction", "sample": "picture prediction"}
_SIGNAL = 2.0**-24  # of the last timestep, squared: in place of the zero that most samplers divide by
_PURE = 1000.0  # noise to signal from which on there is no picture


def known_schedule(source: ModelSource) -> Mapping[str, Any]:
    """What is known of a model's schedule before it is loaded; a hub id's is not."""
    if source.kind == "file":  # every family of single files
        return {"num_train_timesteps": 1000}
    try:
        found = strict_json.load(Path(source.location) / "scheduler" / "scheduler_config.json")
    except (OSError, ValueError):
        found = None  # loading says what is wrong
    return found if isinstance(found, dict) else {}


def check_steps(name: str, steps: int, schedule: Mapping[str, Any], option: str = "--steps") -> None:
    """Raises UsageError if sampler ``name`` cannot draw in so many steps on a schedule, as far as that is known."""
    kind = SCHEDULERS[name][0] if name in SCHEDULERS else schedule.get("_class_name")
    if kind in _DISTILLED:
        limit, has = schedule.get("original_inference_steps", 50), f"sampler {name} draws in"
    else:
        limit, has = schedule.get("num_train_timesteps"), "the model was taught on"
    if isinstance(limit, int) and steps > limit:
        raise UsageError(f"{option}: {steps} steps are too many: {has} {limit}")


def use_scheduler(pipe: Any, name: str, steps: int) -> None:
    """Gives the pipeline the named sampler, with what belongs to the model. "model" keeps the model's own.

    Raises UsageError if there is nothing to take, or the schedule has fewer steps than that.
    """
    own = pipe.scheduler
    if name == "model":
        scheduler = with_usable_scheduler(pipe).scheduler
    else:
        scheduler = _make(own, name)
        logger.info("%s", _describe(scheduler, own, name))
    pipe.scheduler = fit(scheduler, steps, name)


def with_usable_scheduler(pipe: Any) -> Any:
    """The pipeline, its own scheduler replaced by one of its kind if it would divide by a signal that is zero."""
    own = pipe.scheduler
    if _divides_by_zero(type(own), own.config) and _takes(type(own), "trained_betas"):
        pipe.scheduler = type(own).from_config(own.config, **_zero_snr(own.config))
    return pipe


def fit(scheduler: Any, steps: int, name: str) -> Any:
    """The scheduler itself where it can draw in ``steps`` steps, else with steps that trail.

    Leading steps leave out the noisiest timesteps, or overrun them; a single one of linspace is the last. The model's
    own is left as it is unless it would fail. Raises UsageError if there are fewer steps than that.
    """
    check_steps(name, steps, {**scheduler.config, "_class_name": type(scheduler).__name__})
    total = scheduler.config.get("num_train_timesteps")
    spacing = scheduler.config.get("timestep_spacing")
    if total is None or spacing is None:
        return scheduler
    scheduler.set_timesteps(steps)
    first, karras = int(scheduler.timesteps.max()), scheduler.config.get("use_karras_sigmas")
    strides, stride = type(scheduler).__name__ in _STRIDING, total // steps
    fails = first >= total or (len(scheduler.timesteps.unique()) < steps and not karras)
    late = first < 0.9 * total
    if fails or (name != "model" and (late or (strides and spacing == "linspace" and steps < 5))):
        logger.info("%d %s steps would miss the noise that there is: they are trailing", steps, spacing)
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    elif late:
        logger.warning(
            "the model's own %s steps begin at timestep %d of %d, which is too late for noise: more steps, or a "
            "sampler by name, draw better", spacing, first, total,
        )  # fmt: skip
    if strides and total > 1.05 * stride * steps:
        logger.warning(
            "%s removes too little noise in %d steps, which do not divide %d: take %d or %d",
            name, steps, total, total // (stride + 1), total // stride,
        )  # fmt: skip
    return _mend(scheduler)


def _make(own: Any, name: str) -> Any:
    import diffusers

    if "beta_schedule" not in own.config:
        raise UsageError(f"--scheduler {name}: the model's own, {type(own).__name__}, has no betas it could take")
    kind, options = SCHEDULERS[name]
    cls = getattr(diffusers, kind)
    stated = [key for key in _PREFERENCES if key not in own.config.get("_use_default_values", ())]
    taken = {"clip_sample": False} | {key: own.config[key] for key in (*_MODEL, *stated) if key in own.config}
    if _divides_by_zero(cls, taken):
        taken |= _zero_snr(taken)
    return cls(**({key: value for key, value in taken.items() if _takes(cls, key)} | options))


def _divides_by_zero(cls: type, schedule: Mapping[str, Any]) -> bool:
    exact = cls.__name__ in _EXACT and schedule.get("prediction_type", "epsilon") != "epsilon"
    return bool(schedule.get("rescale_betas_zero_snr")) and not exact


def _takes(cls: type, option: str) -> bool:
    return option in inspect.signature(cls).parameters


def _zero_snr(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Betas that end in almost no signal, for samplers that divide by it, but less than a timestep before: where that
    has hardly any, what diffusers puts in place of zero is more."""
    import diffusers
    import torch

    betas = {key: schedule[key] for key in _BETAS if key in schedule}
    signal = diffusers.DDPMScheduler(**betas, rescale_betas_zero_snr=True).alphas_cumprod.double()
    signal[-1] = min(_SIGNAL, signal[-2].item() / 4)
    kept = torch.cat([signal[:1], signal[1:] / signal[:-1]])
    return {"trained_betas": (1 - kept).tolist(), "rescale_betas_zero_snr": False}


def _mend(scheduler: Any) -> Any:
    """Works around what diffusers' schedulers do where sigmas are large, as with zero terminal SNR."""
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    if not hasattr(scheduler, "set_begin_index") or hasattr(set_timesteps, "__wrapped__"):
        return scheduler

    @functools.wraps(set_timesteps)
    def from_the_first(*args: Any, **kwargs: Any) -> None:
        # Else it is looked for by its timestep, and taken to be the second of several: where large sigmas share the
        # last timestep, one is skipped and the end overrun.
        set_timesteps(*args, **kwargs)
        scheduler.set_begin_index(0)

    @functools.wraps(step)
    def euler_at_first(output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        # The mean of the slopes at both ends of a step out of pure noise is off by a multiple of the picture.
        corrects = scheduler.step_index == 1 and not scheduler.state_in_first_order and scheduler.sigmas[0] > _PURE
        result = step(output, timestep, sample, *args, **kwargs)
        if corrects and isinstance(result, tuple):
            return (sample, *result[1:])
        if corrects:
            result.prev_sample = sample
        return result

    scheduler.set_timesteps = from_the_first
    if hasattr(scheduler, "state_in_first_order"):
        scheduler.step = euler_at_first
    return scheduler


def _describe(scheduler: Any, own: Any, name: str) -> str:
    schedule = own.config
    prediction = schedule.get("prediction_type", "epsilon")
    taken = [_PREDICTIONS.get(prediction, prediction)]
    if schedule.get("rescale_betas_zero_snr"):
        taken.append("zero terminal SNR")
    taken.append("its own betas" if schedule.get("trained_betas") is not None else f"{schedule['beta_schedule']} betas")
    spacing = scheduler.config.get("timestep_spacing")
    spaced = spacing is not None and type(scheduler).__name__ not in _DISTILLED
    spaced = spaced and not scheduler.config.get("use_karras_sigmas")
    if spaced and "timestep_spacing" not in schedule.get("_use_default_values", ()):
        taken.append(f"{spacing} steps")
        spaced = False
    return f"sampler {name}: {', '.join(taken)}, from the model" + (f"; {spacing} steps" if spaced else "")
