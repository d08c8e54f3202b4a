"""Where kernels can run, and how they are tuned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

TUNE = "SD_HYENA_TUNE"
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds ``n``; tensor cores multiply sixteen at least."""
    return max(least, triton.next_power_of_2(n))


def autotune(configs: Sequence[dict[str, int]], key: Sequence[str], in_place: Sequence[str] = ()) -> Any:
    """``triton.autotune`` over keyword sets, of which ``num_warps`` and ``num_stages`` are Triton's own.

    in_place: arguments that a kernel both reads and writes, which have to be put back after every trial. What was
    found is kept on disk, next to the compiled kernels. With ``SD_HYENA_TUNE=0``, as in the interpreter, which has
    nothing to tune, the first set is taken untried.
    """
    made = []
    for config in configs:
        own = {k: v for k, v in config.items() if not k.startswith("num_")}
        made.append(triton.Config(own, **{k: v for k, v in config.items() if k.startswith("num_")}))
    return triton.autotune(
        made[:1] if INTERPRETED else made,
        key=list(key),
        restore_value=list(in_place),
        prune_configs_by={"early_config_prune": _candidates},
        cache_results=not INTERPRETED,
    )


def _candidates(configs: list[Any], named_args: Any, **kwargs: Any) -> list[Any]:
    return configs[:1] if os.environ.get(TUNE) == "0" else configs


def runnable(device: torch.device) -> bool:
    """Whether kernels can be run on tensors there."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def on(device: torch.device) -> AbstractContextManager:
    """Where kernels are to be launched, which Triton takes from PyTorch's current device, not from tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
