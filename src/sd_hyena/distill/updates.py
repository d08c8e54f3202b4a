"""One update after the other: losses, gradients, the optimiser's step, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import SdHyenaError
from .losses import Losses
from .settings import TrainSettings
from .students import Students

Averages = tuple[float, dict[str, float], dict[str, float], dict[str, float]]


class Updates:
    """The updates of one stage.

    ``losses`` gives those of a step at some positions of its batch, ``batch_size`` positions at a time; ``files`` are
    the good ones so far, for messages.
    """

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        students: Students,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        losses: Callable[[nn.Module, int, Sequence[int]], Losses],
        batch_size: int,
        seed: int,
        files: Sequence[Path],
    ) -> None:
        self.settings, self.accelerator, self.students, self.model = settings, accelerator, students, model
        self.optimizer, self.scheduler, self.losses = optimizer, scheduler, losses
        self.batch_size, self.seed, self.files = batch_size, seed, files

    def update(self, step: int) -> Averages:
        """One update; the loss, per layer relative error and mean squared error, and the loss's terms, averaged
        over the global batch."""
        s, accelerator, size = self.settings, self.accelerator, self.batch_size
        parts = s.gradient_accumulation_steps
        sums: list[dict[str, Tensor]] = [{}, {}, {}, {}]
        for part in range(parts):
            start = (part * accelerator.num_processes + accelerator.process_index) * size
            with accelerator.accumulate(self.model):
                losses = self._losses(step, range(start, start + size))
                accelerator.backward(losses.total)
                seen = {"loss": losses.total.detach()}, losses.errors, losses.mse, losses.parts
                for total, values in zip(sums, seen, strict=True):
                    for name, value in values.items():
                        total[name] = total.get(name, 0) + value.detach() / parts
                if accelerator.sync_gradients:
                    self._check_finite(step, "loss", sums[1] | sums[3])
                    self._check_finite(step, "gradient", self._clip_gradients())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        loss, errors, mse, terms = (self._over_processes(values) for values in sums)
        return loss["loss"], errors, mse, terms

    def _losses(self, step: int, positions: range) -> Losses:
        self.students.leave_out(self.settings.branch_dropout, self.seed, step)
        with self.accelerator.autocast():
            return self.losses(self.model, step, positions)

    def _over_processes(self, values: dict[str, Tensor]) -> dict[str, float]:
        return {name: self.accelerator.reduce(value, "mean").item() for name, value in values.items()}

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Limits each layer's gradient on its own, so that one layer's trouble is not the others'. Returns
        the norms to be checked: none in float16, where Accelerate's loss scaling expects some overflows."""
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.settings.max_grad_norm or math.inf
        layers = self.students.items()
        norms = {name: torch.nn.utils.clip_grad_norm_(operator.parameters(), limit) for name, operator in layers}
        return {} if self.accelerator.scaler is not None else norms

    def _check_finite(self, step: int, what: str, values: dict[str, Tensor]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value.item())]
        if anywhere(self.accelerator, bool(bad)):
            bad = bad or ["another process"]
            last = f"; the last good file is {self.files[-1]}" if self.files else ""
            raise SdHyenaError(
                f"the {what} of {', '.join(bad)} is not finite at step {step + 1} (seed {self.seed}): lower --lr{last}"
            )


def anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set in any process: all must act on it together, or the others would wait."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item() > 0
