"""TensorBoard logs of a training run, through Accelerate's tracker."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..errors import OutOfMemory, is_out_of_memory
from ..files import cannot_write
from ..finite import damaged_weight
from ..generate.sampling import NotFiniteError, sample
from ..generate.sparing import Sparing
from ..machine import let_go
from ..patch import attach, detach
from .results import Progress, Result
from .students import Students

PICTURES = 2
logger = logging.getLogger(__name__)


class Logbook:
    """Writes scalars after each update, and teacher's and student's pictures from the same seeds at each save.

    What is on noise is named so: errors there are not those on the teacher's pictures. With None for a pipeline there
    are no pictures.
    """

    def __init__(
        self, accelerator: Accelerator, pipe: Any, prompts: list[str], size: tuple[int, int], steps: int
    ) -> None:
        self.accelerator, self.pipe, self.steps = accelerator, pipe, steps
        self.prompts, self.size = prompts[:PICTURES], size
        self._teacher_row: np.ndarray | None = None
        self._lost = False

    def scalars(self, progress: Progress) -> None:
        """Loss and relative error per layer, the whole loss, in stage 2 its terms, and the learning rate."""
        values = {"loss": progress.loss, "lr": progress.lr}
        where = "_on_noise" if progress.on_noise else ""
        values |= {f"loss{where}/{name}": v for name, v in progress.mse.items()}
        values |= {f"relative_error{where}/{name}": v for name, v in progress.relative_error.items()}
        values |= {f"joint/{name}": v for name, v in progress.parts.items()}
        self._write(self.accelerator.log, values, step=progress.step)

    def figures(self, result: Result) -> None:
        """Relative error per layer on what is held out, at the end."""
        tag = "held_out_error_on_noise" if result.measured_on == "noise" else "held_out_error"
        values = {f"{tag}/{name}": figures["relative_error"] for name, figures in result.figures.items()}
        self._write(self.accelerator.log, values, step=result.step)

    def close(self) -> None:
        """Puts what is still to be written on the disk."""
        self._write(self.accelerator.end_training)

    def pictures(self, step: int, students: Students) -> None:
        """A sheet with the teacher's pictures above the students'."""
        if self.pipe is None:
            return
        try:
            if self._teacher_row is None:
                self._teacher_row = self._draw()
            attach(self.pipe.unet, {name: copy.deepcopy(operator) for name, operator in students.items()})
            row = self._draw()
        except Exception as error:  # no reason to lose a run, unless the teacher itself is damaged
            detach(self.pipe.unet)
            not_finite = isinstance(error, NotFiniteError)
            if not_finite and damaged_weight(self.pipe):
                raise
            if not (not_finite or isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                raise
            let_go(error)
            logger.warning("no pictures in the log at step %d: %s", step, error if not_finite else "out of memory")
            return
        finally:
            detach(self.pipe.unet)
        sheet = np.concatenate([self._teacher_row, row], axis=0)
        for tracker in self.accelerator.trackers:
            images = {"teacher above student": sheet[None]}
            self._write(tracker.log_images, images, step=step, dataformats="NHWC")

    def _write(self, action: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """A log that cannot be written is no reason to lose a run."""
        if self._lost:
            return
        try:
            action(*arguments, **options)
        except OSError as error:
            self._lost = True
            folder = self.accelerator.project_configuration.logging_dir
            logger.warning("%s: the run goes on without a log", cannot_write(str(folder), error))

    def _draw(self) -> np.ndarray:
        height, width = self.size
        options = {"height": height, "width": width, "num_inference_steps": self.steps, "guidance_scale": 5.0}
        with Sparing(self.pipe, offload=False) as sparing:  # training has the UNet where it is
            images = sample(self.pipe, self.prompts, range(len(self.prompts)), sparing, **options)
        return np.concatenate([np.asarray(image) for image in images], axis=1)
