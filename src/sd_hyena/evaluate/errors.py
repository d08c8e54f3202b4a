"""Errors of layers and of the whole UNet, by timestep band, against one sweep of the teacher."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distill.capture import capture
from ..distill.losses import Distance
from ..distill.students import Students
from ..finite import is_finite, why_not_finite
from ..generate.sampling import NotFiniteError
from ..nn import Operator
from ..targets import find_targets
from .inputs import HeldOut, Inputs

Figures = dict[str, Any]


class BandDistance:
    """A :class:`Distance` for each timestep band."""

    def __init__(self, bands: int) -> None:
        self.bands = [Distance() for _ in range(bands)]

    def add(self, band: int, student: Tensor, teacher: Tensor) -> None:
        """Takes in one batch of that band, both (B, L, D)."""
        self.bands[band].add(student, teacher)

    def figures(self) -> Figures:
        """``relative_error`` and ``cosine``, each the mean over the bands; ``bands``: the same of each band."""
        each = [distance.figures() for distance in self.bands]
        return {key: sum(f[key] for f in each) / len(each) for key in ("relative_error", "cosine")} | {"bands": each}


class TeacherSweep:
    """One pass of the teacher over the held-out inputs: what its UNet predicts, and every student's layers on the
    activations that the teacher's own layers see.

    ``operators`` are the layers to be measured, by student and target name, on the UNet's device; nothing may be
    attached meanwhile. ``progress`` is told how many calls of how many are done.
    """

    def __init__(
        self,
        pipe: Any,
        inputs: HeldOut,
        operators: Mapping[str, Mapping[str, Operator]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.pipe, self.inputs = pipe, inputs
        targets = find_targets(pipe.unet)
        needed = [t for name, t in targets.items() if any(name in layers for layers in operators.values())]
        attentions = {t.name: pipe.unet.get_submodule(t.path) for t in needed}
        students = {label: Students(layers, attentions) for label, layers in operators.items()}
        count = len(inputs.edges)
        distances = {label: {name: BandDistance(count) for name in layers} for label, layers in operators.items()}
        without: dict[str, dict[str, dict[str, Distance]]] = {
            label: {name: defaultdict(Distance) for name in layers} for label, layers in operators.items()
        }
        self.predictions: list[Tensor] = []

        def look(batch: Inputs) -> tuple[Tensor, list[tuple[Distance, Distance]]]:
            """The teacher's prediction, and what is to be taken in by which distance."""
            prediction, found = _predict(pipe, batch.call), []
            for label, student in students.items():
                for name, y in student(records).items():
                    found.append((distances[label][name].bands[batch.band], Distance.of(y, records[name].y)))
                for name, operator in student.items():
                    for branch in operator.branches:
                        with _left_out(operator, branch):
                            y = student.run(name, records[name])
                        found.append((without[label][name][branch], Distance.of(y, records[name].y)))
            return prediction, found

        with torch.no_grad(), capture(pipe.unet, needed) as records:
            for number, (_, parts) in enumerate(inputs.each(look)):
                self.predictions.append(_joined([prediction for prediction, _ in parts]))
                for distance, more in [pair for _, found in parts for pair in found]:
                    distance.merge(more)
                progress(number + 1, len(inputs))
        self.layers: dict[str, dict[str, Figures]] = {
            label: {
                name: distance.figures()
                | {"without": {off: d.figures()["relative_error"] for off, d in without[label][name].items()}}
                for name, distance in each.items()
            }
            for label, each in distances.items()
        }

    @torch.no_grad()
    def unet_errors(self, guidance: float) -> dict[str, Figures]:
        """The prediction error of the UNet as it stands now, epsilon or v alike: ``|s - t|^2 / |t - mean t|^2``, the
        mean per latent channel over samples and cells.

        ``conditional``: of the prediction with the prompt; ``guided``: of ``u + guidance * (c - u)``, what the sampler
        goes by, where there is guidance.
        """
        count = len(self.inputs.edges)
        results = {"conditional": BandDistance(count)} | ({"guided": BandDistance(count)} if guidance > 1 else {})
        students = self.inputs.each(lambda batch: _predict(self.pipe, batch.call))
        for (band, parts), teacher in zip(students, self.predictions, strict=True):
            student = _joined(parts)
            for name, distance in results.items():
                weight = guidance if name == "guided" else 1.0
                distance.add(band, *(_tokens(_combine(p.float(), weight)) for p in (student, teacher)))
        return {name: distance.figures() for name, distance in results.items()}


def _predict(pipe: Any, call: dict[str, Any]) -> Tensor:
    prediction = pipe.unet(**call).sample.cpu()
    if not is_finite(prediction):
        raise NotFiniteError(f"the UNet's prediction is not finite: {why_not_finite(pipe)}")
    return prediction


@contextlib.contextmanager
def _left_out(operator: Operator, branch: str) -> Iterator[None]:
    operator.off = branch
    try:
        yield
    finally:
        operator.off = ""


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Predictions of parts of a batch, each with the prompts and then without, as that of all of it."""
    return torch.cat([half for halves in zip(*(p.chunk(2) for p in parts), strict=True) for half in halves])


def _combine(prediction: Tensor, guidance: float) -> Tensor:
    """Predictions (2 B, C, h, w), with the prompts and then without -> (B, C, h, w)."""
    conditional, unconditional = prediction.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _tokens(prediction: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)"""
    return prediction.flatten(2).transpose(1, 2)
