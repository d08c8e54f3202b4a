"""What a Hyena file holds, once read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .nn import OperatorConfig


@dataclass
class Origin:
    """Where an operator came from; it travels with the module, so that saving it again keeps the record."""

    figures: dict[str, float]
    teacher: dict[str, Any]
    training: dict[str, Any]


@dataclass
class LayerInfo:
    """One layer of a file: how to build its operator, and figures recorded in training."""

    config: OperatorConfig
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class HyenaFile:
    """A parsed file. ``layers`` maps target names to layers; a legacy file without a target uses ''.

    ``teacher`` identifies the model the layers were trained against, ``training`` records how.
    """

    layers: dict[str, LayerInfo]
    tensors: dict[str, dict[str, Tensor]]
    teacher: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    version: int = 1
    path: Path | None = None

    def build(self, name: str) -> nn.Module:
        """The operator of one layer with its weights, in evaluation mode."""
        operator = self.layers[name].config.build()
        operator.load_state_dict(self.tensors[name])
        operator.origin = Origin(self.layers[name].figures, self.teacher, self.training)
        return operator.eval()
