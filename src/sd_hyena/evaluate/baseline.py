"""Another operator taught on exactly what a student was taught on, so that the two can stand in one table."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..distill.settings import HYENA, TrainSettings
from ..distill.shards import finished_manifest
from ..distill.state import STATE, locked
from ..errors import SdHyenaError, UsageError
from ..hyena_file import HyenaFile
from ..models import DEMO, fingerprint
from ..settings import resolve

# Settings that do not change what a run ends with: where it runs, and where and when it saves.
MAY_DIFFER = ("out_dir", "log_dir", "name_format", "save_every_n_steps", "device")
# Settings of the student's own operator.
OPERATOR_SETTINGS = ("form", "global_branch", "scaling", "hyena_num_blocks", *HYENA)
logger = logging.getLogger(__name__)


class Baseline:
    """The training run that a student's file records, with another operator.

    ``folder`` keeps its files; a run that was cut off there is gone on with. Raises UsageError if the file does not
    record its run, or the run cannot be repeated; CheckpointError if the file is unusable.
    """

    def __init__(self, student: Path | str, operator: str, folder: Path | str, device: str) -> None:
        self.operator, self.folder = operator, Path(folder)
        self.student = checkpoint.load(student)
        own = {
            "operator": operator,
            # Linear attention as others train it, whatever features the student has.
            "feature_map": "elu",
            "num_features": 1,
            "out_dir": str(folder),
            "log_dir": str(folder),
            "name_format": "Hyena-{s:05d}",
            "save_every_n_steps": 0,
            "device": device,
        }
        usual = {f.name: f.default for f in dataclasses.fields(TrainSettings)}
        self.settings = _recorded(self.student, own | {name: usual[name] for name in OPERATOR_SETTINGS})
        if self.settings.data_dir:
            finished_manifest(Path(self.settings.data_dir))
        self.file = self.folder / f"Hyena-{self.settings.total_steps:05d}.safetensors"

    def finished(self) -> bool:
        """Whether the folder holds the end of this very run. Raises UsageError if it is another run's."""
        if not self.file.is_file():
            return False
        before, now = checkpoint.load(self.file), dataclasses.asdict(self.settings)
        changed = [k for k in now if k not in MAY_DIFFER and before.training.get(k) != now[k]]
        if before.teacher != self.student.teacher or changed:
            raise UsageError(
                f"{self.file} is the baseline of another run ({', '.join(changed) or 'teacher'}): choose another "
                "--out_dir, or remove its folder"
            )
        # The end of a run has figures on held-out batches; without them it was stopped while saving.
        return all(layer.figures for layer in before.layers.values())

    def train(
        self,
        pipe: Any,
        phase: Callable[[str], None] = logger.info,
        on_progress: Callable[[Any], None] = lambda progress: None,
        on_prepare: Callable[[int, int], None] = lambda done, total: None,
    ) -> Path:
        """Trains what is still to be trained, with the teacher in ``pipe``, of the type it had in the student's run;
        returns the file. The callbacks are the :class:`Trainer`'s.

        Raises UsageError if the student was taught by another teacher; KeyboardInterrupt if stopped, after saving.
        """
        teacher = fingerprint(pipe)
        if teacher != self.student.teacher:
            raise UsageError(f"{self.student.path}: was taught by another model, which a baseline would need too")
        if self.finished():
            phase(f"the baseline is in {self.file}")
            return self.file
        from accelerate import Accelerator

        from ..distill.trainer import Trainer

        s = self.settings
        if ":" in s.device:
            torch.cuda.set_device(s.device)
        accelerator = Accelerator(
            mixed_precision=s.mixed_precision,
            gradient_accumulation_steps=s.gradient_accumulation_steps,
            cpu=s.device == "cpu",
        )
        with locked(self.folder):
            resume = (self.folder / STATE).exists()
            phase(f"teaching the baseline, {self.operator} attention: {s.total_steps} steps in {self.folder}")
            trainer = Trainer(
                s,
                pipe,
                teacher,
                accelerator,
                is_demo=s.teacher_model == DEMO,
                on_phase=phase,
                on_progress=on_progress,
                on_prepare=on_prepare,
            )
            result = trainer.run(resume)
        if result.interrupted:
            raise KeyboardInterrupt
        return self.file


def _recorded(student: HyenaFile, own: dict[str, Any]) -> TrainSettings:
    """The settings of the run that wrote ``student``, with the baseline's own. Raises UsageError."""
    record = student.training
    known = {f.name for f in dataclasses.fields(TrainSettings)}
    if "teacher_model" not in record or "n_steps" not in record:
        raise UsageError(f"{student.path}: does not record how it was trained, so no baseline can be trained likewise")
    if record.get("pretrained_weight"):
        raise UsageError(
            f"{student.path}: was trained from {record['pretrained_weight']}: a baseline cannot start from there"
        )
    try:
        settings = resolve(TrainSettings, {k: v for k, v in record.items() if k in known} | own)
        settings.validate()
    except TypeError as error:
        raise SdHyenaError(f"{student.path}: its record of the training is malformed: {error}") from None
    step = record.get("step", settings.total_steps)
    if step != settings.total_steps:
        logger.warning(
            "%s was saved at step %s of %s: the baseline is trained for all of them",
            student.path,
            step,
            settings.total_steps,
        )
    return settings
