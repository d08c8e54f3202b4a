"""How far a student's output is from its teacher's, free of the layer's scale."""

from __future__ import annotations

from torch import Tensor


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``|y - t|^2 / |t - mean(t)|^2``, both (B, L, D), the mean per channel over batch and tokens.

    1 is what predicting each channel's mean would score. It is the training loss of a layer, and the
    figure reported for it: per-layer magnitudes differ up to 200x (https://arxiv.org/abs/2410.10254), so
    plain MSE would teach only the loudest.
    """
    teacher = teacher.float()
    spread = (teacher - teacher.mean((0, 1), keepdim=True)).square().sum()
    return (student.float() - teacher).square().sum() / spread.clamp(min=1e-12)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine similarity of the two outputs as vectors."""
    s, t = student.float().flatten(), teacher.float().flatten()
    return (s @ t) / (s.norm() * t.norm()).clamp(min=1e-12)
