"""Where kernels can run, and how they are tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds ``n``; tensor cores multiply sixteen at least."""
    return max(least, triton.next_power_of_2(n))


def autotune(configs: Sequence[dict[str, int]], key: Sequence[str]) -> Any:
    """``triton.autotune`` over keyword sets, of which ``num_warps`` and ``num_stages`` are Triton's own.

    What was found is kept on disk, next to the compiled kernels. The interpreter has nothing to tune: it takes
    the first.
    """
    made = []
    for config in configs[:1] if INTERPRETED else configs:
        own = {k: v for k, v in config.items() if not k.startswith("num_")}
        made.append(triton.Config(own, **{k: v for k, v in config.items() if k.startswith("num_")}))
    return triton.autotune(made, key=list(key), cache_results=not INTERPRETED)


def runnable(device: torch.device) -> bool:
    """Whether kernels can be run on tensors there."""
    return device.type == ("cpu" if INTERPRETED else "cuda")
