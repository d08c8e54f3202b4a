"""What a model predicts and how its noise ends: as the user says, or the model itself, or as its weights show."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..texts import MAX_TEXT
from .choices import ModelChoices
from .single_file import Checkpoint

V_SPREAD = 0.09  # of the values of a family's ``v_mark``, as ComfyUI tells v from epsilon
_YES = ("true", "1", "yes")
_V_IN_YAML = re.compile(r"""^[ \t]*parameterization:[ \t]*["']?v["']?[ \t]*(#.*)?$""", re.MULTILINE)
logger = logging.getLogger(__name__)


@dataclass
class Marked:
    """What a single file says of its schedule; None: nothing. ``by_weights``: says so by its weights alone."""

    prediction_type: str | None = None
    zero_snr: bool | None = None
    by_weights: bool = False


def read_marks(checkpoint: Checkpoint) -> Marked:
    """From the keys ``v_pred`` and ``ztsnr``, the metadata that trainers write, a configuration of LDM beside the file
    under its name, or else the weights."""
    metadata, marked = checkpoint.tensors.metadata, Marked()
    said = metadata.get("modelspec.prediction_type", "").lower()
    v_trained = metadata.get("ss_v_parameterization", "").lower() in _YES or _yaml_says_v(checkpoint.tensors.path)
    if "v_pred" in checkpoint.names or said.startswith("v") or v_trained:
        marked.prediction_type = "v_prediction"
    elif said.startswith("eps"):
        marked.prediction_type = "epsilon"
    if "ztsnr" in checkpoint.names or metadata.get("ss_zero_terminal_snr", "").lower() in _YES:
        marked.zero_snr = True
    mark = checkpoint.family.v_mark
    if marked.prediction_type is None and mark in checkpoint.names:
        spread = checkpoint.tensors.get(checkpoint.names[mark]).float().std(correction=0).item()
        marked.prediction_type, marked.by_weights = "v_prediction" if spread > V_SPREAD else "epsilon", True
    return marked


def _yaml_says_v(path: Path) -> bool:
    try:
        with open(path.with_suffix(".yaml"), encoding="utf-8", errors="replace") as file:
            return bool(_V_IN_YAML.search(file.read(MAX_TEXT)))
    except OSError:
        return False


def _tell(name: str, choices: ModelChoices, marked: Marked) -> None:
    """Logs the marks that are obeyed."""
    said = []
    if choices.prediction_type == "auto" and marked.by_weights:
        logger.info(
            "model %s: does not say whether it predicts epsilon or v; by its weights it is taken for %s "
            "(--prediction_type says otherwise)",
            name,
            marked.prediction_type,
        )
    elif choices.prediction_type == "auto" and marked.prediction_type == "v_prediction":
        said.append(marked.prediction_type)
    if choices.zero_snr == "auto" and marked.zero_snr:
        said.append("zero terminal SNR")
    if said:
        logger.info("model %s: is marked as one of %s (see --prediction_type, --zero_snr)", name, ", ".join(said))


def set_schedule(pipe: Any, name: str, choices: ModelChoices | None = None, marked: Marked | None = None) -> None:
    """Makes the pipeline's scheduler what the choices say, or else the marks, which are logged; without either it stays
    as it is.

    With zero terminal SNR the timesteps are spaced as "trailing", so that the first is the one of pure noise.
    """
    marked, choices = marked or Marked(), choices or ModelChoices()
    _tell(name, choices, marked)
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
    unknown = [change for change in changes if change not in taken]
    if unknown:
        from diffusers import DDIMScheduler

        logger.info("model %s: its %s knows no %s: DDIM takes its place", name, kind.__name__, ", ".join(unknown))
        kind = DDIMScheduler
        changes.setdefault("clip_sample", config.get("clip_sample", False))  # latents are not confined to [-1, 1]
    pipe.scheduler = kind.from_config(config, **changes)
