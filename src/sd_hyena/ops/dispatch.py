"""Which code runs a long convolution at inference: the one place where that is decided.

``BACKENDS`` lists them from the most to the least preferred; the first that does not refuse a case takes it. The
environment variable ``SD_HYENA_KERNEL`` names one to prefer over all; what it refuses is taken as without it.
Every choice off the CPU is logged once, and so, as a warning, is every case that a backend asked for by name refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import environment, gemm_conv, long_conv

HALVES = (torch.float16, torch.bfloat16)
LARGEST_FLASH, LARGEST_COLUMNS = 128, 512  # cells a side
logger = logging.getLogger(__name__)


class Case(NamedTuple):
    """A convolution to be run: on what device, of what type, grid (h, w), kernel radius; ``mean``: with the
    grid's mean as global branch."""

    device: torch.device
    dtype: torch.dtype
    grid: tuple[int, int]
    radius: tuple[int, int]
    mean: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to convolve. ``spectral``: the module whose ``spectrum_shape`` and ``kernel_spectrum`` it goes by;
    ``convolve(u, spectrum, radius)``: (B, D, h, w), contiguous -> the same; ``gated``: whether ``convolve`` takes
    ``gate=(q, scale)``, a factor 1 + scale q on the result; ``refuses(case)``: why it cannot, or "". ``where`` and
    ``what`` are for people."""

    name: str
    where: str
    what: str
    spectral: ModuleType
    convolve: Callable[..., Tensor]
    refuses: Callable[[Case], str]
    gated: bool = False

    def spectrum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of spectra of kernels of that type."""
        if self.spectral is gemm_conv:
            return torch.float16
        return torch.promote_types(dtype, torch.complex64)


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The Triton kernels, or None, with one line in the log, where they cannot be loaded."""
    try:
        from .kernels import columns, features, flash, launch, short_gate  # noqa: F401
    except (ImportError, AttributeError) as error:  # the latter of a Triton older than what they are written for
        if torch.cuda.is_available():
            logger.info("no Triton kernels: %s", error)
        return None
    from . import kernels

    return kernels


def _refuses_halves(case: Case) -> str:
    if case.dtype not in HALVES:
        return f"multiplies in float16: not for {str(case.dtype).removeprefix('torch.')}"
    if case.mean and case.radius != (case.grid[0] - 1, case.grid[1] - 1):
        return "cannot take a mean with kernels that do not reach over the grid"
    return ""


def _refuses_gemm(case: Case) -> str:
    return _refuses_halves(case) or ("no tensor cores on a CPU" if case.device.type == "cpu" else "")


def _refuses_kernels(case: Case, largest: int) -> str:
    if kernels() is None:
        return "Triton is not there"
    if reason := kernels().launch.refuses(case.device):
        return reason
    if max(case.grid) > largest:
        return f"for grids up to {largest} x {largest}"
    return _refuses_halves(case)


def _flash(u: Tensor, spectrum: Tensor, radius: tuple[int, int], **how: Any) -> Tensor:
    with kernels().launch.on(u.device):
        return kernels().flash.convolve(u, spectrum, radius, **how)


def _columns(u: Tensor, spectrum: Tensor, radius: tuple[int, int]) -> Tensor:
    with kernels().launch.on(u.device):
        return gemm_conv.convolve(u, spectrum, radius, torch.float16, kernels().columns.columns)


def _gemm(u: Tensor, spectrum: Tensor, radius: tuple[int, int]) -> Tensor:
    return gemm_conv.convolve(u, spectrum, radius, torch.float16)


FFT = Backend(
    "fft", "everywhere", "torch.fft in float32, few planes at a time", long_conv, long_conv.convolve, lambda case: ""
)
BACKENDS = (
    Backend(
        "flash", f"Triton, float16 and bfloat16, grids to {LARGEST_FLASH} x {LARGEST_FLASH}",
        "the whole convolution of a plane in one kernel", gemm_conv, _flash,
        lambda case: _refuses_kernels(case, LARGEST_FLASH), gated=True,
    ),
    Backend(
        "columns", f"Triton, float16 and bfloat16, grids to {LARGEST_COLUMNS} x {LARGEST_COLUMNS}",
        "matrix products along rows, one kernel along columns", gemm_conv, _columns,
        lambda case: _refuses_kernels(case, LARGEST_COLUMNS),
    ),
    Backend(
        "gemm", "accelerators, float16 and bfloat16", "matrix products along rows and columns", gemm_conv, _gemm,
        _refuses_gemm,
    ),
    FFT,
)  # fmt: skip


def choose(case: Case) -> Backend:
    """The backend for a case. Raises UsageError if ``SD_HYENA_KERNEL`` names none."""
    return _choose(case, environment.kernel())


@lru_cache(maxsize=4096)
def _choose(case: Case, name: str) -> Backend:
    if case.device.type == "cpu" and not name:  # where Triton interprets, it is for tests
        return FFT
    if name:
        asked = next(backend for backend in BACKENDS if backend.name == name)
        reason = asked.refuses(case)
        if not reason:
            log(f"long convolutions by {name}, as {environment.KERNEL} asks")
            return asked
        log(f"{environment.KERNEL}={name} is passed over: {reason}", logging.WARNING)
    chosen = next(backend for backend in BACKENDS if not backend.refuses(case))
    h, w = case.grid
    log(
        f"long convolutions on a {h} x {w} grid by {chosen.name}: {chosen.what} "
        f"({case.device.type}, {str(case.dtype).removeprefix('torch.')})"
    )
    return chosen


@lru_cache(maxsize=256)
def log(line: str, level: int = logging.INFO) -> None:
    """Logs a line the first time."""
    logger.log(level, line)


def table() -> list[str]:
    """``BACKENDS`` as a Markdown table, for the documentation."""
    rows = [f"| {i} | `{b.name}` | {b.where} | {b.what} |" for i, b in enumerate(BACKENDS, start=1)]
    return ["| | backend | where | what |", "|---:|---|---|---|", *rows]
