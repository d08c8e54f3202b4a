"""What a training run tells while it runs, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..nn import OperatorConfig


@dataclass
class Progress:
    """What a training run tells its observer after each update."""

    step: int
    total: int
    loss: float  # what was minimised; in stage 1 the mean relative error over the layers
    relative_error: dict[str, float]
    mse: dict[str, float]
    lr: float
    parts: dict[str, float] = field(default_factory=dict)  # stage 2's terms, not weighted
    on_noise: bool = False  # whether the errors are on noise, and not on the teacher's pictures


@dataclass
class Result:
    """What a run ends with: per layer, figures on held-out batches of the teacher's pictures or of noise
    (``measured_on``: "teacher" or "noise"); the files written; whether cut short."""

    figures: dict[str, dict[str, float]]
    configs: dict[str, OperatorConfig]
    files: list[Path]
    step: int
    interrupted: int = 0  # the signal's number
    seconds: float = 0.0
    seed: int = 0
    measured_on: str = "teacher"
