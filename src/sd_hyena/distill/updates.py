"""One update after the other: losses, gradients, the optimiser's step, over all processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import OutOfMemory, SdHyenaError, is_out_of_memory
from ..machine import Batches
from .losses import Losses
from .settings import TrainSettings
from .students import Students

Averages = tuple[float, dict[str, float], dict[str, float], dict[str, float]]
logger = logging.getLogger(__name__)


class Updates:
    """The updates of one stage.

    ``losses`` gives those of a step at some positions of its batch, of which ``batch_size`` come at a time, or as many
    as ``batches`` allows: they halve whenever memory runs out, and what an update is the mean of stays the same.
    ``forget`` is called then, to let go of what is kept for batches of the former size. ``files`` are the good ones so
    far, for messages.

    Each process computes its gradients by itself, and all take their mean when every one of them has come through:
    where gradients are exchanged while they are computed (DistributedDataParallel), one that runs out of memory leaves
    the others waiting.
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
        forget: Callable[[], None],
    ) -> None:
        self.settings, self.accelerator, self.students, self.model = settings, accelerator, students, model
        self.optimizer, self.scheduler, self.losses = optimizer, scheduler, losses
        self.batch_size, self.seed, self.files, self.forget = batch_size, seed, files, forget
        self.batches = Batches(batch_size, "in an update", what_to_lower(settings))
        if accelerator.num_processes > 1:
            broadcast(list(students.state_dict().values()))  # all start from the same, in place

    def update(self, step: int) -> Averages:
        """One update; the loss, per layer relative error and mean squared error, and the loss's terms, averaged
        over the global batch. Raises OutOfMemory if there is no room for one picture at a time."""
        while (sums := self._gradients(step)) is None:
            self.optimizer.zero_grad()
            self.forget()
        try:
            return self._step(step, sums)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"out of memory in the optimiser at step {step + 1}: teach fewer layers at once with --target"
                + self._last_good()
            ) from error

    def _gradients(self, step: int) -> list[dict[str, Tensor]] | None:
        """Computes this process's gradients, and its part of what ``update`` returns. None, and smaller batches from
        here, if any process has run out of memory."""
        sums: list[dict[str, Tensor]] | None = None
        failure = None
        try:
            sums = self._accumulate(step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        if not anywhere(self.accelerator, failure is not None):
            return sums
        sums = None  # let go of, in processes that have come through
        before = self.batches.size
        try:
            self.batches.halve(failure, before)
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}{self._last_good()}") from failure
        if self.accelerator.is_main_process:
            parts, size = self.settings.gradient_accumulation_steps, self.batch_size
            shapes = [f"{n} x {parts * -(-size // n)}" for n in (self.batches.size, before)]
            logger.warning(
                "out of memory at step %d: micro-batches of %s instead of %s from here; the effective batch stays %d",
                step + 1, *shapes, size * parts * self.accelerator.num_processes,
            )  # fmt: skip
        return None

    def _accumulate(self, step: int) -> list[dict[str, Tensor]]:
        accelerator, size, parts = self.accelerator, self.batch_size, self.settings.gradient_accumulation_steps
        self.students.leave_out(self.settings.branch_dropout, self.seed, step)
        sums: list[dict[str, Tensor]] = [{}, {}, {}, {}]
        for part in range(parts):
            start = (part * accelerator.num_processes + accelerator.process_index) * size
            for first in range(start, start + size, self.batches.size):
                positions = range(first, min(first + self.batches.size, start + size))
                weight = len(positions) / (size * parts)
                with accelerator.autocast():
                    losses = self.losses(self.model, step, positions)
                accelerator.backward(losses.total * weight)
                seen = {"loss": losses.total}, losses.errors, losses.mse, losses.parts
                for total, values in zip(sums, seen, strict=True):
                    for name, value in values.items():
                        total[name] = total.get(name, 0) + value.detach() * weight
        return sums

    def _step(self, step: int, sums: list[dict[str, Tensor]]) -> Averages:
        self._check_finite(step, "loss", sums[1] | sums[3])
        self._average_gradients()
        self._check_finite(step, "gradient", self._clip_gradients())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        loss, errors, mse, terms = (self._over_processes(values) for values in sums)
        return loss["loss"], errors, mse, terms

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes > 1:  # a branch that is left out has none, in any process
            gradients = [p.grad for p in self.students.parameters() if p.grad is not None]
            mean = self.accelerator.reduce(parameters_to_vector(gradients), "mean")
            vector_to_parameters(mean, gradients)

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
            raise SdHyenaError(
                f"the {what} of {', '.join(bad) or 'another process'} is not finite at step {step + 1} (seed "
                f"{self.seed}): lower --lr{self._last_good()}"
            )

    def _last_good(self) -> str:
        return f"; the last good file is {self.files[-1]}" if self.files else ""


def what_to_lower(settings: TrainSettings) -> str:
    """What a run that has no room for a single picture can do without."""
    size = "--sizes" if settings.sizes else "--width and --height"
    size = f"the size of the pictures in {settings.data_dir}" if settings.data_dir else size
    reuse = ", or --reuse" if settings.reuse > 1 else ""
    checkpointing = "" if settings.gradient_checkpointing else "; --gradient_checkpointing saves memory in stage 2"
    return f"{size}{reuse}, or teach fewer layers at once with --target{checkpointing}"


def anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set in any process: all must act on it together, or the others would wait."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item() > 0
