"""What lies between a layer's projections: a near filter, and linear attention whose states are mixed over blocks.

``PATHS`` are the ways to compute it, from the most to the least preferred; the first that does not refuse a call
takes it. ``SD_HYENA_KERNEL`` names one to prefer over all. ``triton`` is believed only after it agreed with ``plain``
on random data: :mod:`.trust`.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .. import environment
from . import cpu, gpu, plain, trust
from .call import Call, planes

__all__ = ["PATHS", "Call", "Path", "choose", "mix", "planes"]
logger = logging.getLogger(__name__)


class Path(Protocol):
    """One way to compute a :class:`Call`."""

    NAME: str
    CHECKED: bool  # whether it is held to ``plain`` at its first use

    def refuses(self, call: Call) -> str:
        """Why it cannot take this call, or ""."""

    def run(self, call: Call) -> Tensor:
        """(B, L, H d)"""


PATHS: tuple[Path, ...] = (gpu, cpu, plain)


def mix(call: Call) -> Tensor:
    """The call's result, (B, L, H d), by the path that :func:`choose` finds. The reference is ``States.reference``."""
    if torch.compiler.is_compiling():
        return plain.run(call)
    path = choose(call)
    return trust.run(path, plain, call) if path.CHECKED else path.run(call)


def choose(call: Call) -> Path:
    """The first path that does not refuse a call. Raises UsageError if ``SD_HYENA_KERNEL`` names none."""
    asked = environment.kernel()
    for path in sorted(PATHS, key=lambda path: asked != path.NAME):
        reason = path.refuses(call)
        if not reason:
            if call.v.device.type != "cpu" or asked == path.NAME:
                log(f"Hyena layers on {call.v.device.type} by {path.NAME}")
            return path
        if asked == path.NAME:
            log(f"{environment.KERNEL}={asked} is passed over: {reason}", logging.WARNING)
    raise AssertionError("plain refuses nothing")


@lru_cache(maxsize=256)
def log(line: str, level: int = logging.INFO) -> None:
    """Logs a line the first time."""
    logger.log(level, line)
