"""What a Hyena file holds, once read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .nn import Operator, OperatorConfig, build
from .placement import weights_of


@dataclass
class Origin:
    """Where an operator came from; it travels with the module, so that saving it again keeps the record."""

    figures: dict[str, float]
    teacher: dict[str, Any]
    training: dict[str, Any]
    path: Path | None = None  # None: from no file


@dataclass
class LayerInfo:
    """One layer of a file: how to build its operator, figures recorded in training, and records of its own where
    they are not the file's."""

    config: OperatorConfig
    figures: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, Any] | None = None
    training: dict[str, Any] | None = None


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

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.path) if self.path else "the state dict"

    def origin(self, name: str) -> Origin:
        """What is recorded of one layer."""
        layer = self.layers[name]
        teacher = self.teacher if layer.teacher is None else layer.teacher
        training = self.training if layer.training is None else layer.training
        return Origin(layer.figures, teacher, training, self.path)

    def build(self, name: str, scaling: str | None = None) -> Operator:
        """The operator of one layer with its weights, in evaluation mode; ``scaling`` overrides the file's."""
        config = self.layers[name].config
        operator = build(config if scaling is None else replace(config, scaling=scaling))
        operator.load_state_dict(self.tensors[name])
        operator.origin = self.origin(name)
        return operator.eval()


def gather(operators: Mapping[str, Operator], origins: Mapping[str, Origin]) -> HyenaFile:
    """Operators as a file holds them, with what is recorded of each; the first record is the file's.

    Weights are copies on the CPU.
    """
    first = next(iter(origins.values()), Origin({}, {}, {}))
    file = HyenaFile({}, {}, first.teacher, first.training)
    for name, operator in operators.items():
        kept, origin = operator.folded(), origins.get(name, Origin({}, {}, {}))
        file.layers[name] = LayerInfo(kept.config, origin.figures, origin.teacher, origin.training)
        file.tensors[name] = weights_of(kept)
    return file
