"""What a user may say about a model beside its name. Light: imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import UsageError
from ..settings import option

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(kw_only=True)
class ModelChoices:
    """Part of the settings of every command that loads a model."""

    variant: str = option("", "weights of a diffusers folder or hub id to take, such as fp16; none: the plain ones")
    prediction_type: str = option(
        "auto", "what the UNet predicts; auto: what the model says of itself", choices=("auto", *PREDICTIONS)
    )
    zero_snr: str = option(
        "auto",
        "whether sampling starts from pure noise (zero terminal SNR); auto: what the model says of itself",
        choices=("auto", "on", "off"),
    )

    def model_choices(self) -> dict[str, Any]:
        """These choices alone, by name."""
        return {f.name: getattr(self, f.name) for f in fields(ModelChoices)}

    def check_model_choices(self, model: str) -> None:
        """Raises UsageError if they are about no model, or none that can be chosen."""
        for f in fields(ModelChoices):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise UsageError(f"--{f.name} must be one of {', '.join(choices)}, got {value!r}")
            if not model and value != f.default:
                raise UsageError(f"--{f.name} says something of a model: give one with -m/--model")
