"""What the environment can ask of inference on a GPU. Light: imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import UsageError

KERNEL = "SD_HYENA_KERNEL"  # the way of convolving to prefer over all others
LOW_MEMORY = "SD_HYENA_LOW_MEMORY"  # 1: less memory at the price of speed
TUNE = "SD_HYENA_TUNE"  # 0: a kernel's first candidate is taken untried
KERNELS = ("flash", "columns", "gemm", "fft")


def kernel() -> str:
    """The way of convolving that is asked for, or "". Raises UsageError for one that there is not."""
    name = os.environ.get(KERNEL, "")
    if name and name not in KERNELS:
        raise UsageError(f"{KERNEL} must be one of {', '.join(KERNELS)}, got {name!r}")
    return name


def low_memory() -> bool:
    """Whether to work on fewer channels at a time, and keep only spectra that leave a layer below attention's
    memory."""
    return os.environ.get(LOW_MEMORY, "0") not in ("", "0")


def tunes() -> bool:
    """Whether kernels' candidates are tried at their first use."""
    return os.environ.get(TUNE) != "0"


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Within, these variables have these values."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
