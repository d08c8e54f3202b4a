"""Building the operators to be taught, and running them side by side."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..hyena_file import HyenaFile
from ..layer_choice import choose_layers
from ..nn import Operator, OperatorConfig, build
from ..nn.teacher import projections_of
from ..patch import check_replaceable
from ..targets import Target, find_targets
from .capture import Captured

logger = logging.getLogger(__name__)


class Students(nn.Module):
    """The operators of all selected layers, run side by side on captured inputs."""

    def __init__(self, operators: Mapping[str, Operator], attentions: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(operators)
        self.operators = nn.ModuleList(operators.values())
        self._attentions = (dict(attentions),)  # frozen teacher layers: not ours to register

    def items(self) -> list[tuple[str, Operator]]:
        return list(zip(self.names, self.operators, strict=True))

    def leave_out(self, share: float, seed: int, step: int) -> None:
        """In that share of the updates leaves one branch of each operator out, the same in every run of a seed."""
        for name, operator in self.items():
            draw = random.Random(f"{seed}/{step}/{name}")
            operator.off = draw.choice(operator.branches) if operator.branches and draw.random() < share else ""

    def forward(self, records: Mapping[str, Captured]) -> dict[str, Tensor]:
        """Each layer's output (B, h * w, D) for the teacher's input to it."""
        return {name: self.run(name, records[name]) for name in self.names}

    def run(self, name: str, record: Captured) -> Tensor:
        """One layer's output."""
        operator = self.operators[self.names.index(name)]
        given = projections_of(self._attentions[0][name]) if operator.core else None
        return operator(record.x, record.size, given)


def configure(target: Target, latent_grid: tuple[int, int], unet: nn.Module, **choices: Any) -> OperatorConfig:
    """The operator for one layer of ``unet``, of which no weights are needed; ``choices`` are OperatorConfig
    fields. Raises UsageError if they do not fit the layer."""
    height, width = target.grid(latent_grid)
    check_replaceable(unet, target)
    try:
        config = OperatorConfig(
            dim=target.dim,
            height=height,
            width=width,
            inner_dim=0 if target.inner_dim == target.dim else target.inner_dim,
            attention_heads=target.heads,
            **choices,
        )
        with torch.device("meta"):
            build(config)
    except ValueError as error:
        raise UsageError(f"hyena settings do not fit layer {target.name}: {error}") from None
    return config


def pretrained_layers(
    file: HyenaFile, unet: nn.Module, target: str, targets: Sequence[Target]
) -> dict[str, tuple[OperatorConfig, dict[str, Tensor]]]:
    """Configuration and weights of ``targets`` from a Hyena file. Raises UsageError if it lacks one of them."""
    chosen = {name: stored for stored, name in choose_layers(find_targets(unet), file, target).items()}
    missing = [t.name for t in targets if t.name not in chosen]
    if missing:
        raise UsageError(f"{file.path}: holds no layer {', '.join(missing)}; it has {', '.join(file.layers)}")
    logger.warning(
        "%s sets the operators: the options that choose them, and --init, do not apply",
        file.path,
    )
    return {name: (file.layers[stored].config, file.tensors[stored]) for name, stored in chosen.items()}
