"""How far a student's output is from its teacher's, free of the layer's scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .capture import Captured


@dataclass
class Losses:
    """One batch's loss, and what it is made of: per layer the relative error and mean squared error, and the
    joint stage's terms before they are weighted."""

    total: Tensor
    errors: dict[str, Tensor]
    mse: dict[str, Tensor]
    parts: dict[str, Tensor] = field(default_factory=dict)


def layer_losses(
    outputs: Mapping[str, Tensor], records: Mapping[str, Captured], variances: Mapping[str, float]
) -> Losses:
    """Each layer's MSE to its teacher's output over that output's variance; their mean is the loss."""
    mse = {name: torch.nn.functional.mse_loss(y.float(), records[name].y.float()) for name, y in outputs.items()}
    errors = {name: square / variances[name] for name, square in mse.items()}
    return Losses(torch.stack(list(errors.values())).mean(), errors, mse)


def variance(teacher: Tensor) -> float:
    """Mean square of a teacher's output (B, L, D) around its channels' means.

    A layer's training loss is MSE over this: per-layer magnitudes differ up to 200x
    (https://arxiv.org/abs/2410.10254), so plain MSE would teach only the loudest.
    """
    teacher = teacher.float()
    return (teacher - teacher.mean((0, 1), keepdim=True)).square().mean().clamp(min=1e-12).item()


class Distance:
    """Relative error and cosine over any number of batches, however they are cut.

    The relative error is ``|y - t|^2 / |t - mean(t)|^2``, the mean per channel over batch and tokens: 1 is
    what predicting each channel's mean would score.
    """

    def __init__(self) -> None:
        self.count = 0
        self.error = self.product = self.student_square = self.teacher_square = 0.0
        self.teacher_sum: Tensor | float = 0.0

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> Distance:
        """That of one batch, both (B, L, D)."""
        s, t = student.double(), teacher.double()
        found = cls()
        found.count = t.shape[0] * t.shape[1]
        found.error = (s - t).square().sum().item()
        found.product = (s * t).sum().item()
        found.student_square = s.square().sum().item()
        found.teacher_square = t.square().sum().item()
        found.teacher_sum = t.sum((0, 1))
        return found

    def merge(self, other: Distance) -> None:
        """Takes in what ``other`` has of further batches."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Takes in one batch, both (B, L, D)."""
        self.merge(Distance.of(student, teacher))

    def figures(self) -> dict[str, float]:
        """``relative_error``, and ``cosine`` of the outputs as vectors."""
        mean_square = torch.as_tensor(self.teacher_sum).square().sum().item() / self.count
        return {
            "relative_error": self.error / max(self.teacher_square - mean_square, 1e-12),
            "cosine": self.product / max((self.student_square * self.teacher_square) ** 0.5, 1e-12),
        }
