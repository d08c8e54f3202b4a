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
from .losses import Losses, layer_losses, snr_weights
from .settings import TrainSettings
from .students import Students


class StudentUNet(nn.Module):
    """The teacher's UNet with the students in it. Frozen weights are the teacher's own tensors, not copies."""

    def __init__(self, students: Students, unet: nn.Module, targets: Sequence[Target], checkpointing: bool) -> None:
        super().__init__()
        self.students, self._targets = students, targets  # registered once: these are what learns
        replaced = {id(p) for t in targets for p in unet.get_submodule(t.path).parameters()}
        # What is replaced may be moved out of the way, so it must not be the teacher's.
        shared = {id(p): p for p in [*unet.parameters(), *unet.buffers()] if id(p) not in replaced}
        clone = copy.deepcopy(unet, shared)
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
    """Losses of stage 2: prediction, guided prediction, layers' outputs, and the task itself; see TrainSettings."""

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
        # A guided pair needs every sample's own prompt; the empty one comes with it.
        self.paired = settings.guided_weight > 0
        self.inputs = TeacherInputs(pipe, data, seed, 0.0 if self.paired else settings.unconditional)
        self.noising = self.inputs.noising

    def losses(self, model: nn.Module, step: int, positions: Sequence[int]) -> Losses:
        """Of one batch of ``len(positions)`` UNet samples; a pair takes two of them."""
        s = self.settings
        if self.paired:  # numbered so that pairs are the same however many processes share the batch
            positions = range(positions[0] // 2, positions[0] // 2 + len(positions) // 2)
        batch = self.inputs.batch(step, positions)
        inputs = _doubled(batch.inputs, self.inputs.unconditional(batch)) if self.paired else batch.inputs
        with torch.no_grad(), capture(self.teacher, self.targets) as records:
            wanted = self.teacher(**inputs).sample.float()
        taught = dict(records)
        got, said = model(inputs)
        got = got.float()
        kind = self.noising.config.prediction_type
        weights = snr_weights(self.noising.alphas_cumprod, batch.timesteps, kind, s.snr_gamma)
        layers = layer_losses({name: r.y for name, r in said.items()}, taught, self.variances)
        parts = {
            "prediction": _weighted(got - wanted, weights),
            "feature": torch.stack(list(layers.errors.values())).mean(),
        }
        scale = {"prediction": s.prediction_weight, "feature": s.feature_weight}
        if self.paired:
            difference = got - wanted
            conditional, unconditional = difference.chunk(2)
            guided = unconditional + s.guidance * (conditional - unconditional)
            # Over the variance it would have, were the two errors independent: comparable with the plain term.
            parts["guided"] = _weighted(guided, weights) / (s.guidance**2 + (s.guidance - 1) ** 2)
            scale["guided"] = s.guided_weight
        if s.task_weight:
            target = self._target(kind, batch.latents, batch.noise, batch.timesteps)
            # An unconditional sample of a pair has the same target.
            parts["task"] = _weighted(got - target.repeat(len(got) // len(target), 1, 1, 1), weights)
            scale["task"] = s.task_weight
        total = torch.stack([scale[name] * part for name, part in parts.items()]).sum()
        return Losses(total, layers.errors, layers.mse, {name: part.detach() for name, part in parts.items()})

    def _target(self, kind: str, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.noising.get_velocity(latents, noise, timesteps)
        return latents


def _doubled(conditional: Mapping[str, Any], unconditional: Mapping[str, Any]) -> dict[str, Any]:
    """Both calls as one: the conditional samples first."""
    joined: dict[str, Any] = {}
    for name, value in conditional.items():
        other = unconditional[name]
        joined[name] = _doubled(value, other) if isinstance(value, dict) else torch.cat([value, other])
    return joined


def _weighted(difference: Tensor, weights: Tensor) -> Tensor:
    """Mean square per sample, (B, ...), weighted by its timestep; several samples may share a timestep."""
    square = difference.square().flatten(1).mean(1)
    return (square * weights.to(square.device).repeat(len(square) // len(weights))).mean()
