"""Stage 2: the whole UNet with all students in place, taught to predict what the teacher predicts.

Stage 1 teaches each layer on its teacher's inputs; in use it gets what the other students made of them. Here
all learn together, everything else frozen, and the gradient comes from the UNet's prediction and from the
layers' own outputs (as in LinFusion, https://arxiv.org/abs/2409.02097, and CLEAR, https://arxiv.org/abs/2412.16112).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..patch import attach
from ..targets import Target
from .capture import Captured, capture
from .data import Dataset, TeacherInputs
from .losses import Losses, layer_losses
from .settings import TrainSettings
from .students import Students


class StudentUNet(nn.Module):
    """The teacher's UNet with the students in it. Frozen weights are the teacher's own tensors, not copies."""

    def __init__(self, students: Students, unet: nn.Module, targets: Sequence[Target], checkpointing: bool) -> None:
        super().__init__()
        self.students, self._targets = students, targets  # registered once: these are what learns
        clone = copy.deepcopy(unet, {id(p): p for p in [*unet.parameters(), *unet.buffers()]})
        attach(clone, dict(students.items()), convert=False)
        if checkpointing:
            clone.enable_gradient_checkpointing()
        self._unet = (clone,)  # frozen: not ours to register

    def forward(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Captured]]:
        """The prediction, (B, C, h, w), and each layer's input and output, with their gradients."""
        with capture(self._unet[0], self._targets, detach=False) as records:
            prediction = self._unet[0](**inputs).sample
            return prediction, dict(records)


class JointStage:
    """Losses of stage 2: the prediction, and the layers' outputs; see TrainSettings."""

    def __init__(
        self,
        settings: TrainSettings,
        pipe: Any,
        data: Dataset,
        seed: int,
        targets: Sequence[Target],
        variances: Mapping[str, float],
    ) -> None:
        self.settings, self.teacher, self.targets, self.variances = settings, pipe.unet, targets, variances
        self.inputs = TeacherInputs(pipe, data, seed, settings.unconditional)

    def losses(self, model: nn.Module, step: int, positions: Sequence[int]) -> Losses:
        """Of one batch of ``len(positions)`` UNet samples."""
        inputs = self.inputs.batch(step, positions)
        with torch.no_grad(), capture(self.teacher, self.targets) as records:
            wanted = self.teacher(**inputs).sample.float()
        taught = dict(records)
        got, said = model(inputs)
        prediction = torch.nn.functional.mse_loss(got.float(), wanted)
        layers = layer_losses({name: r.y for name, r in said.items()}, taught, self.variances)
        total = self.settings.prediction_weight * prediction + self.settings.feature_weight * layers.total
        parts = {"prediction": prediction.detach(), "feature": layers.total.detach()}
        return Losses(total, layers.errors, layers.mse, parts)
