"""Where kernels can run, and how they are tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

from .. import environment

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds ``n``; tensor cores multiply sixteen at least."""
    return max(least, triton.next_power_of_2(n))


class Tuned:
    """A kernel and its candidates: ``triton.autotune``'s choice of them, or, with ``SD_HYENA_TUNE=0``, the first."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tuner, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if environment.tunes():
            return self.tuner[grid]
        return partial(self.tuner.fn[grid], **self.tuner.configs[0].all_kwargs())


def autotune(
    configs: Sequence[dict[str, int]], key: Sequence[str], in_place: Sequence[str] = ()
) -> Callable[[Any], Tuned]:
    """A decorator: candidates are keyword sets, of which ``num_warps`` and ``num_stages`` are Triton's own.

    in_place: arguments that a kernel both reads and writes, which have to be put back after every trial. What was
    found is kept on disk, next to the compiled kernels. The interpreter has nothing to tune: it takes the first.
    """
    made = []
    for config in configs:
        own = {k: v for k, v in config.items() if not k.startswith("num_")}
        made.append(triton.Config(own, **{k: v for k, v in config.items() if k.startswith("num_")}))
    tune = triton.autotune(
        made[:1] if INTERPRETED else made,
        key=list(key),
        restore_value=list(in_place),
        cache_results=not INTERPRETED,
    )
    return lambda kernel: Tuned(tune(kernel))


@lru_cache(maxsize=64)
def refuses(device: torch.device) -> str:
    """Why kernels cannot be run on tensors there, or ""."""
    if INTERPRETED:
        return "" if device.type == "cpu" else "Triton interprets, which it does on a CPU"
    if device.type != "cuda":
        return f"Triton kernels do not run on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability {major}.{minor}: the kernels are made for 8.0 and newer"


def on(device: torch.device) -> AbstractContextManager:
    """Where kernels are to be launched, which Triton takes from PyTorch's current device, not from tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
