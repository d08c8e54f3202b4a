"""What the optimiser does with which weight: parameter groups, learning rates, schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..nn import Hyena2D

RATE = 0.64  # over a layer's channels: 1e-2 at 64, 2e-3 at 320
BETAS = (0.9, 0.99)  # a second moment that forgets fast: runs are a few hundred steps
FILTER_RATE = 1e-2  # of the layer's rate, for the filter's hidden layers


def parameter_groups(operator: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: projections decay, nothing else does, and a ``Hyena2D``'s filter learns more slowly.

    A kernel has as many taps as the grid has cells, so a step of its last layer moves their sum that much
    further than a step of a projection moves anything: its rate is the projections' over the cells.
    """
    rates = {"filter.head.": 1.0, "filter.mlp.": FILTER_RATE} if isinstance(operator, Hyena2D) else {}
    if isinstance(operator, Hyena2D):
        height, width = operator.filter.extent
        rates["filter.head."] = 1 / (height * width)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in operator.named_parameters():
        factor = next((r for prefix, r in rates.items() if name.startswith(prefix)), 1.0)
        decay = weight_decay if name in ("in_proj.weight", "out_proj.weight") else 0.0
        groups.setdefault((factor * rate, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def make_optimizer(
    operators: Iterable[nn.Module], rate: float, factor: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over all layers, at ``rate``; for a rate of 0 each layer at ``factor * RATE`` over its channels."""
    rates = [(operator, rate or factor * RATE / int(operator.dim)) for operator in operators]
    groups = [group for operator, own in rates for group in parameter_groups(operator, own, weight_decay)]
    return torch.optim.AdamW(groups, betas=BETAS)


def make_schedule(optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int, processes: int) -> Any:
    """A diffusers learning rate schedule over ``steps``. Accelerate steps it once per process at each update."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        name, optimizer, num_warmup_steps=min(warmup, steps) * processes, num_training_steps=steps * processes
    )
