"""What the optimiser does with which weight: learning rates and their schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..nn import Operator

RATE = 0.64  # over a layer's channels: 1e-2 at 64, 2e-3 at 320
BETAS = (0.9, 0.99)  # a second moment that forgets fast: runs are a few hundred steps


def make_optimizer(
    operators: Iterable[Operator], rate: float, factor: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over all layers, at ``rate``; for a rate of 0 each layer at ``factor * RATE`` over its channels."""
    rates = [(operator, rate or factor * RATE / int(operator.dim)) for operator in operators]
    groups = [group for operator, own in rates for group in operator.parameter_groups(own, weight_decay)]
    return torch.optim.AdamW(groups, betas=BETAS)


def make_schedule(optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int, processes: int) -> Any:
    """A diffusers learning rate schedule over ``steps``. Accelerate steps it once per process at each update."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        name, optimizer, num_warmup_steps=min(warmup, steps) * processes, num_training_steps=steps * processes
    )
