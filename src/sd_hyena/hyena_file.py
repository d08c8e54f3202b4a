"""What a Hyena file holds, once read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .nn import Operator, OperatorConfig, build


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

    def build(self, name: str, scaling: str | None = None) -> Operator:
        """The operator of one layer with its weights, in evaluation mode; ``scaling`` overrides the file's."""
        config = self.layers[name].config
        operator = build(config if scaling is None else replace(config, scaling=scaling))
        operator.load_state_dict(self.tensors[name])
        operator.origin = Origin(self.layers[name].figures, self.teacher, self.training)
        return operator.eval()
