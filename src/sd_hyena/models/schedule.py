"""What a model predicts and how its noise ends: as the user says, or the model itself, or as its weights show."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

from .choices import ModelChoices
from .single_file import Checkpoint

V_SPREAD = 0.09  # of the values of a family's ``v_mark``, as ComfyUI tells v from epsilon
logger = logging.getLogger(__name__)


@dataclass
class Marked:
    """What a single file says of its schedule; None: nothing."""

    prediction_type: str | None = None
    zero_snr: bool | None = None


def read_marks(checkpoint: Checkpoint) -> Marked:
    """From the keys ``v_pred`` and ``ztsnr``, the metadata that trainers write, or else the weights; logs which."""
    metadata, marked = checkpoint.tensors.metadata, Marked()
    said = metadata.get("modelspec.prediction_type", "").lower()
    v_trained = metadata.get("ss_v_parameterization", "").lower() == "true"
    if "v_pred" in checkpoint.tensors or said.startswith("v") or v_trained:
        marked.prediction_type = "v_prediction"
    elif said.startswith("eps"):
        marked.prediction_type = "epsilon"
    if "ztsnr" in checkpoint.tensors or metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        marked.zero_snr = True
    mark = checkpoint.family.v_mark
    if marked.prediction_type is None and mark in checkpoint.names:
        spread = checkpoint.tensors.get(checkpoint.names[mark]).float().std(correction=0).item()
        marked.prediction_type = "v_prediction" if spread > V_SPREAD else "epsilon"
        logger.info(
            "model %s: does not say whether it predicts epsilon or v; by its weights it is taken for %s "
            "(--prediction_type says otherwise)",
            checkpoint.name,
            marked.prediction_type,
        )
    elif marked.zero_snr or marked.prediction_type == "v_prediction":
        zero = ["zero terminal SNR"] if marked.zero_snr else []
        said = ", ".join(filter(None, [marked.prediction_type, *zero]))
        logger.info("model %s: is marked as one of %s (see --prediction_type, --zero_snr)", checkpoint.name, said)
    return marked


def set_schedule(pipe: Any, name: str, choices: ModelChoices | None = None, marked: Marked | None = None) -> None:
    """Makes the pipeline's scheduler what the choices say, or else the marks; without either it stays as it is.

    With zero terminal SNR the timesteps are spaced as "trailing", so that the first is the one of pure noise.
    """
    marked, choices = marked or Marked(), choices or ModelChoices()
    config, changes = pipe.scheduler.config, dict[str, Any]()
    prediction = marked.prediction_type if choices.prediction_type == "auto" else choices.prediction_type
    if prediction and prediction != config.get("prediction_type", "epsilon"):
        changes["prediction_type"] = prediction
    zero = marked.zero_snr if choices.zero_snr == "auto" else choices.zero_snr == "on"
    if zero is not None and zero != bool(config.get("rescale_betas_zero_snr")):
        changes["rescale_betas_zero_snr"] = zero
        if zero:
            changes["timestep_spacing"] = "trailing"
    if not changes:
        return
    kind = type(pipe.scheduler)
    taken = inspect.signature(kind.__init__).parameters
    if any(change not in taken for change in changes):
        from diffusers import DDIMScheduler

        logger.info("model %s: its %s knows no %s: DDIM takes its place", name, kind.__name__, ", ".join(changes))
        kind = DDIMScheduler
        changes.setdefault("clip_sample", config.get("clip_sample", False))  # latents are not confined to [-1, 1]
    pipe.scheduler = kind.from_config(config, **changes)
