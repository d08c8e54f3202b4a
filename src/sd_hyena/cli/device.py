"""What a command computes on, and in which type."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UsageError
from ..processes import here


def choose_dtype(mixed_precision: str) -> Any:
    """The torch type that a teacher runs in under ``--mixed_precision``."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def choose_device(name: str) -> str:
    """ "auto" -> "cuda" if there is one, else "cpu"; of several processes on a machine, each gets its own GPU. Raises
    UsageError for one that is not there, or of no use here."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", name):
        raise UsageError(f"--device {name!r}: use auto, cpu, cuda or cuda:N (mps on a Mac)")
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and here().count > 1 and torch.cuda.is_available():
        return f"cuda:{here().local % torch.cuda.device_count()}"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this machine has no usable CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UsageError(f"--device {name}: this machine's last CUDA device is cuda:{last}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: this machine has no usable MPS device")
    return name
