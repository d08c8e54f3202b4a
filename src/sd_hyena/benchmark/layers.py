"""One self-attention layer against the Hyena layers that may replace it, at growing sizes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SdHyenaError
from ..nn import OperatorConfig
from ..ops import fft, naive
from .timing import Timing, interleaved

TOLERANCE = 1e-5  # relative RMS, FFT against the O(L^2) definition
SLOW_SECONDS = 20.0  # a kind slower than this per call is skipped at larger sizes


@dataclass
class Row:
    """One kind at one size. ``ratio`` is attention's median over this kind's; None where skipped."""

    width: int
    kind: str
    timing: Timing | None
    ratio: float | None
    note: str = ""


class Attention(nn.Module):
    """Self-attention as in a UNet's ``attn1``: bias-free q, k, v projections, SDPA, output projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def run_sizes(
    widths: Sequence[int],
    dim: int,
    heads: int,
    batch: int,
    budget: float,
    report: Callable[[Row], None],
    vae_factor: int = 8,
) -> list[Row]:
    """Times whole layers (projections included) on square images of the given widths in px, in float32.

    Before a size is timed, the FFT convolution is checked against its definition on that very grid;
    raises SdHyenaError if it is off by more than ``TOLERANCE``.
    """
    rows: list[Row] = []
    slow: set[str] = set()
    for width in widths:
        cells = width // vae_factor
        check_convolution((cells, cells))
        kinds: dict[str, nn.Module] = {"attention (SDPA)": Attention(dim, heads)}
        for branch in ("mean", "linear"):
            config = OperatorConfig(dim, cells, cells, attention_heads=heads, global_branch=branch, in_bias=False)
            kinds[f"hyena2d {branch}"] = config.build()
        kinds["hyena causal"] = OperatorConfig(dim, cells, cells, operator="causal").build()
        x = torch.randn(batch, cells * cells, dim)
        calls = {
            name: _call(module.eval().requires_grad_(False), x, (cells, cells))
            for name, module in kinds.items()
            if name not in slow
        }
        timings = interleaved(calls, repeats=15, budget=budget)
        base = timings.get("attention (SDPA)")
        for name in kinds:
            timing = timings.get(name)
            if timing is None:
                row = Row(width, name, None, None, f"skipped: over {SLOW_SECONDS:g} s at the size before")
            else:
                row = Row(width, name, timing, base.median / timing.median if base else None)
                if timing.median * (4 if "SDPA" in name else 1) > 1000 * SLOW_SECONDS:
                    slow.add(name)
            rows.append(row)
            report(row)
    return rows


def _call(module: nn.Module, x: Tensor, size: tuple[int, int]) -> Callable[[], Tensor]:
    return (lambda: module(x)) if isinstance(module, Attention) else (lambda: module(x, size))


def check_convolution(grid: tuple[int, int], channels: int = 1) -> float:
    """Relative RMS error of the FFT convolution on ``grid``, against the definition in float64.

    Above 48 x 48 cells the definition is evaluated on a sample of output cells. Raises SdHyenaError above
    ``TOLERANCE``.
    """
    h, w = grid
    u, k = torch.randn(1, channels, h, w), torch.randn(channels, 2 * h - 1, 2 * w - 1)
    fast = fft.conv2d(u, fft.kernel_spectrum(k, grid), (h - 1, w - 1)).double()
    if h * w <= 48 * 48:
        exact = naive.conv2d(u.double(), k.double())
    else:
        cells = [(i * 7919 % h, i * 104729 % w) for i in range(16)]
        patches = [k[:, i : i + h, j : j + w].flip(-2, -1) for i, j in cells]
        exact = torch.stack([(p.double() * u[0].double()).sum((-2, -1)) for p in patches], -1)
        fast = torch.stack([fast[0, :, i, j] for i, j in cells], -1)
    error = ((fast - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    if error > TOLERANCE:
        raise SdHyenaError(f"the FFT convolution is off by {error:.1e} on a {h} x {w} grid: no times are reported")
    return error


def crossover(rows: Sequence[Row], kind: str) -> int | None:
    """The smallest measured width from which ``kind`` stays faster than attention, or None."""
    ratios = [(row.width, row.ratio) for row in rows if row.kind == kind and row.ratio is not None]
    losing = [width for width, ratio in ratios if ratio < 1]
    return next((width for width, _ in ratios if not losing or width > max(losing)), None)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
