"""How alike two pictures are. Needs torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PSNR = 100.0  # dB; what identical pictures count as, so that means stay finite
_WINDOW, _SPREAD = 11, 1.5  # px of SSIM's Gaussian window, and its standard deviation
_C1, _C2 = 0.01**2, 0.03**2  # that keep SSIM's quotients finite


def psnr(a: Tensor, b: Tensor) -> float:
    """``10 log10(1 / MSE)`` in dB of two pictures of the same shape with values in [0, 1], at most MAX_PSNR."""
    mse = (a.double() - b.double()).square().mean()
    return MAX_PSNR if mse == 0 else min(MAX_PSNR, (-10 * mse.log10()).item())


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two pictures (C, h, w) with values in [0, 1], the mean over channels and all places of a
    Gaussian window, the pictures being mirrored at their edges; 1 for the same picture. Pictures smaller than the
    window have a smaller one.

    Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
    """
    size = min(_WINDOW, *(side - 1 + side % 2 for side in a.shape[1:]))
    places = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    window = torch.exp(-(places**2) / (2 * _SPREAD**2))
    window /= window.sum()

    def blurred(x: Tensor) -> Tensor:
        x = F.pad(x[:, None], [size // 2] * 4, mode="reflect")
        return F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])

    x, y = a.double(), b.double()
    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return (alike * (2 * covariance + _C2) / (variances + _C2)).mean().item()
