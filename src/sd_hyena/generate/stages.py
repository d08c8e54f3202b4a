"""The stages of a picture: at the native size, then perhaps at a higher one; and where in them Hyena is. Imports no
torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..texts import size_in

if TYPE_CHECKING:
    from .settings import GenerateSettings

NATIVE, HIRES = "native", "hires"
HIRES_STRENGTH = 0.4  # enough for new detail, little enough to keep the outlines


@dataclass(frozen=True)
class Stage:
    """One run of the sampler: ``width`` x ``height`` px in the last ``steps`` of ``schedule`` steps, which begin with
    ``strength`` of the noise, with Hyena layers or with the attention they replace."""

    name: str
    width: int
    height: int
    steps: int
    schedule: int
    strength: float
    hyena: bool


def stages(settings: GenerateSettings) -> list[Stage]:
    """What is drawn one after the other. Raises UsageError for a high size that makes no sense."""
    first = Stage(NATIVE, settings.width, settings.height, settings.steps, settings.steps, 1.0, True)
    found = [first]
    if settings.hires:
        strength = settings.hires_strength
        schedule = settings.steps
        if settings.hires_steps:
            schedule = math.ceil(settings.hires_steps / strength)
            schedule += int(schedule * strength) < settings.hires_steps  # rounding
        found.append(Stage(HIRES, *_hires_size(settings), int(schedule * strength), schedule, strength, True))
    both = len(found) == 1 or settings.hires_hyena == "both"
    wanted = [max(s.width, s.height) > settings.hyena_above and (both or s.name == HIRES) for s in found]
    return [replace(stage, hyena=hyena) for stage, hyena in zip(found, wanted, strict=True)]


def check_stages(settings: GenerateSettings) -> None:
    """Raises UsageError for what cannot work."""
    start, end = active_range(settings.hyena_range)
    for stage in stages(settings):
        if stage.steps < 1:
            raise UsageError(
                f"--hires_strength {stage.strength:g} leaves none of {stage.schedule} steps: give --hires_steps"
            )
        if stage.hyena and not any(start <= step / stage.steps < end for step in range(stage.steps)):
            raise UsageError(f"--hyena_range {settings.hyena_range} holds none of the {stage.steps} {stage.name} steps")
    told = (settings.hires_strength, settings.hires_steps, settings.hires_hyena) != (HIRES_STRENGTH, 0, "hires")
    if told and not settings.hires:
        raise UsageError("--hires_strength, --hires_steps and --hires_hyena are about a high size: give --hires WxH")
    if (settings.hyena_above or (start, end) != (0, 1)) and not settings.hyena:
        raise UsageError("--hyena_above and --hyena_range are about Hyena layers: give some with -y/--hyena")


def active_range(text: str) -> tuple[float, float]:
    """``0.2-1.0`` -> (0.2, 1.0). Raises UsageError."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*", text)
    start, end = map(float, match.groups()) if match else (1.0, 0.0)
    if not 0 <= start < end <= 1:
        raise UsageError(f"--hyena_range {text!r} must be two shares of the steps, such as 0.2-1.0")
    return start, end


def hires_fields(settings: GenerateSettings) -> dict[str, Any]:
    """What a PNG says of the high size, in A1111's words."""
    high = [stage for stage in stages(settings) if stage.name == HIRES]
    if not high:
        return {}
    return {
        "Denoising strength": f"{high[0].strength:g}",
        "Hires resize": f"{high[0].width}x{high[0].height}",
        "Hires steps": high[0].steps,
        "Hires upscaler": "Lanczos",
    }


def hyena_fields(settings: GenerateSettings) -> dict[str, Any]:
    """What a PNG says of where in the picture's making Hyena was, unless it was all along."""
    fields = {}
    if settings.hires or settings.hyena_above:
        fields["Hyena stages"] = "+".join(stage.name for stage in stages(settings) if stage.hyena) or "none"
    if active_range(settings.hyena_range) != (0, 1):
        fields["Hyena range"] = settings.hyena_range
    return fields


def _hires_size(settings: GenerateSettings) -> tuple[int, int]:
    size = size_in(settings.hires)
    if size is None:
        raise UsageError(f"--hires {settings.hires!r} must be a size in px such as 2048x2048")
    width, height = size
    across, down = width / max(1, settings.width), height / max(1, settings.height)
    if min(across, down) < 1 or max(across, down) == 1:
        raise UsageError(f"--hires {settings.hires} must be larger than {settings.width}x{settings.height}")
    if abs(across / down - 1) > 0.03:  # more than rounding to multiples of 8
        near = f"{width}x{max(8, round(settings.height * across / 8) * 8)}"
        raise UsageError(
            f"--hires {settings.hires} is of another shape than {settings.width}x{settings.height}: give {near}, say"
        )
    return width, height
