"""The training loop over both stages; Accelerate runs the optimisation.

Stage 1 teaches every layer on its teacher's inputs, all from one teacher pass; stage 2 (:mod:`.joint`) teaches
them together, in the UNet.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import checkpoint, interrupts
from ..arguments import shown
from ..errors import OutOfMemory, SdHyenaError, UsageError, is_out_of_memory
from ..files import Claim
from ..fingerprint import exact
from ..hyena_file import Origin, gather
from ..machine import Batches
from ..names import used_fields
from ..nn import OperatorConfig, build
from ..processes import Place
from ..targets import find_targets, select
from .joint import JointStage, StudentUNet
from .lessons import Lessons, NoiseLessons, PictureLessons, Reuse
from .losses import Distance, Losses, layer_losses
from .optimisation import make_optimizer, make_schedule
from .prepare import training_data
from .results import Progress, Result
from .resume import read_state, restore, resuming
from .settings import TrainSettings
from .state import STATE, Average, save_state
from .students import Students, configure, pretrained_layers
from .updates import Updates, anywhere, what_to_lower

VALIDATION_SAMPLES = 64
MAX_OVERFLOWS = 40
# Settings that may differ between a run and its resumption; all others must be the same.
MAY_CHANGE = {"log_dir", "out_dir", "data_dir", "save_every_n_steps", "device", "seed"}
logger = logging.getLogger(__name__)


class Trainer:
    """Teaches the operators of the selected layers of one pipeline; for a run that needs no pictures, ``pipe`` may be
    a teacher of which only these layers were read. ``teacher`` is its record (see :mod:`..fingerprint`).

    ``on_progress`` is called after every update, ``on_phase`` with a line for each longer phase, ``on_save``
    after each save with the step and the students, ``on_prepare`` with the number of pictures there, and of
    how many, while the teacher draws.
    """

    def __init__(
        self,
        settings: TrainSettings,
        pipe: Any,
        teacher: dict[str, Any],
        accelerator: Accelerator,
        is_demo: bool = False,
        on_phase: Callable[[str], None] = logger.info,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_save: Callable[[int, Students], None] = lambda step, students: None,
        on_prepare: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.settings, self.pipe, self.teacher, self.accelerator = settings, pipe, teacher, accelerator
        self.on_phase, self.on_progress, self.on_save, self.is_demo = on_phase, on_progress, on_save, is_demo
        self.on_prepare = on_prepare
        self.out = Path(settings.out_dir)
        self.targets = select(find_targets(pipe.unet), settings.target)
        self.attentions = {t.name: pipe.unet.get_submodule(t.path) for t in self.targets}
        factor = pipe.vae_scale_factor
        self.grid = (settings.height // factor, settings.width // factor)
        self.latents = [(height // factor, width // factor) for width, height in settings.training_sizes()]
        self.global_batch = settings.batch_size * accelerator.num_processes
        lower = what_to_lower(settings)
        self.passes = Batches(self.global_batch, "in the teacher's passes", lower)
        self.measured = Batches(settings.batch_size, "while measuring", lower)
        self.configs = self._configure()
        self._signal = 0
        self.files: list[Path] = []
        self._first_errors: dict[str, float] = {}

    def run(self, resume: bool = False) -> Result:
        """Trains to the last step, or until a signal asks for the end; then saves. Raises SdHyenaError if the loss
        stops being finite, leaving the last good files in place."""
        with interrupts.handled():
            return self._run(resume)

    def _run(self, resume: bool) -> Result:
        started = time.time()
        reads = resume and self.accelerator.is_main_process
        state = broadcast_object_list([read_state(self.out) if reads else None])[0]
        if state is None and self.accelerator.is_main_process:
            (self.out / STATE).unlink(missing_ok=True)  # of another run, which this one replaces
        if resume and state is None:
            self.on_phase(f"nothing to resume in {self.out}: starting at step 0")
        self.claim = Claim(self.out.glob("*.safetensors"))
        self.seed = self._choose_seed(state)
        torch.manual_seed(self.seed)
        # What must be the same when the run is resumed, besides the settings.
        processes = self.accelerator.num_processes
        self.identity: dict[str, Any] = {"teacher": exact(self.teacher), "processes": processes}
        if state is not None:  # before the teacher draws anything
            self._check_same_run(state)
        self.identity["pictures"] = self._prepare_inputs()
        self.students = self._make_students(started_from=state)
        self.variances = self.lessons.variances(self.global_batch, self.passes)
        step = 0
        if state is not None:
            self._check_same_run(state)
            step = state["step"]
            with resuming(self.out / STATE):
                self.students.load_state_dict(state["students"])
                if not self._can_be(state["stage"], step):
                    raise ValueError(f"stage {state['stage']} has no step {step}")
            self.on_phase(f"resuming at step {step}")
        s, later = self.settings, state is not None and state["stage"] == 2
        if s.n_steps and not later:
            self._enter(self.students, 1, state)
            step = self._train(step, s.n_steps)
            if s.finetune_steps:
                self._finish(step)
        if s.finetune_steps and not self._signal:
            step = self._fine_tune(step, state if later else None)
        figures = self._finish(step)
        seconds = time.time() - started
        return Result(figures, self.configs, self.files, step, self._signal, seconds, self.seed, s.measured_on)

    def _fine_tune(self, step: int, state: dict[str, Any] | None) -> int:
        """Stage 2, from its start or from where ``state`` was saved."""
        s = self.settings
        self.on_phase(f"stage 2: {s.finetune_steps} steps with all layers in the UNet")
        self.accelerator.free_memory()
        self.reuse.forget()
        assert self.pictures is not None
        if self.lessons is not self.pictures:  # what the layers are held to is real from here on
            self.variances = self.pictures.variances(self.global_batch, self.passes)
        model = StudentUNet(self.students, self.pipe.unet, self.targets, s.gradient_checkpointing)
        self._joint = JointStage(s, self.pipe, self.pictures.data, self.seed, self.targets, self.variances)
        self._enter(model, 2, state)
        return self._train(step, s.total_steps)

    def _enter(self, model: torch.nn.Module, stage: int, state: dict[str, Any] | None) -> None:
        """Makes optimiser, schedule and average of a stage, as they were where ``state`` was saved."""
        s, accelerator = self.settings, self.accelerator
        rate, factor, steps = s.lr, 1.0, s.n_steps
        if stage == 2:
            rate, factor, steps = s.finetune_lr or s.lr / 10, 0.1, s.finetune_steps
        operators = [operator for _, operator in self.students.items()]
        optimizer = make_optimizer(operators, rate, factor, s.weight_decay)
        scheduler = make_schedule(optimizer, s.lr_scheduler, s.lr_warmup_steps, steps, accelerator.num_processes)
        self.average = Average(self.students, s.ema_decay if stage == 2 else 0)
        if state is not None:
            with resuming(self.out / STATE):
                restore(optimizer, scheduler, self.average, state)
                if accelerator.scaler is not None and state["scaler"]:
                    accelerator.scaler.load_state_dict(state["scaler"])
        self.stage = stage
        self.optimizer, self.scheduler = accelerator.prepare(optimizer, scheduler)
        losses, size = self._layer_losses, s.batch_size
        if stage == 2:
            losses, size = self._joint.losses, s.finetune_batch_size or s.batch_size
        self.updates = Updates(
            s, accelerator, self.students, model, self.optimizer, self.scheduler, losses, size, self.seed, self.files,
            self.reuse.forget,
        )  # fmt: skip
        if state is not None:
            self.updates.batches.size = min(size, state["micro_batch_size"])
        if state is None and (stage == 1 or not s.n_steps):
            self._save_state(0)  # whatever stops the run from here on, it can be resumed

    def _layer_losses(self, model: torch.nn.Module, step: int, positions: Sequence[int]) -> Losses:
        records = self.reuse.training(step, positions)
        return layer_losses(model(records), records, self.variances)

    def _finish(self, step: int) -> dict[str, dict[str, float]]:
        """Measures what a stage came to, unless a signal stopped it."""
        if self._signal:
            return {}
        figures = self._evaluate()
        self._warn_of_worse(figures)
        self._save(step, figures)  # the same weights again, now with their figures
        self._show(step)
        return figures

    def _warn_of_worse(self, figures: dict[str, dict[str, float]]) -> None:
        """Of layers that training has led away from the teacher, if they are measured on what they learn from."""
        if self.settings.learns_from_noise != (self.settings.measured_on == "noise"):
            return
        ends = {name: (self._first_errors.get(name, math.inf), f["relative_error"]) for name, f in figures.items()}
        worse = [f"{n} {first:.2g} to {last:.2g}" for n, (first, last) in ends.items() if last > 1.5 * first]
        if worse and self.accelerator.is_main_process:
            logger.warning(
                "training has made the error larger (%s): lower --lr, or take more --n_images, steps or a larger "
                "--batch_size", ", ".join(worse),
            )  # fmt: skip

    # -- setting up ---------------------------------------------------------------------------------

    def _configure(self) -> dict[str, OperatorConfig]:
        if not self.settings.pretrained_weight:
            choices = self.settings.choices()
            return {t.name: configure(t, self.grid, self.pipe.unet, **choices) for t in self.targets}
        file = checkpoint.load(self.settings.pretrained_weight)
        self._pretrained = pretrained_layers(file, self.pipe.unet, self.settings.target, self.targets)
        return {name: config for name, (config, _) in self._pretrained.items()}

    def _choose_seed(self, state: dict[str, Any] | None) -> int:
        given = self.settings.seed
        if state is None:
            drawn = [given if given >= 0 else random.SystemRandom().randrange(2**31)]
            return broadcast_object_list(drawn)[0]
        if given not in (-1, state["seed"]):
            raise UsageError(f"cannot resume {self.out} with seed {given}: the run's seed is {state['seed']}")
        return state["seed"]

    def _prepare_inputs(self) -> str:
        """Opens what is learned from and measured on. Pictures, where needed, are drawn by the teacher first; returns
        their identity."""
        s = self.settings
        noise = NoiseLessons(self.attentions, self.targets, self.latents, self.seed)
        self.pictures: PictureLessons | None = None
        if s.needs_pictures:
            place = Place(self.accelerator.process_index, self.accelerator.num_processes)
            data = training_data(s, self.pipe, self.teacher, self.is_demo, self.on_phase, self.on_prepare, place)
            self.pictures = PictureLessons(self.pipe, self.targets, data, self.seed, s.unconditional)
        self.lessons: Lessons = noise if s.learns_from_noise or self.pictures is None else self.pictures
        self.measuring: Lessons = noise if s.measured_on == "noise" or self.pictures is None else self.pictures
        self.reuse = Reuse(self.lessons, s.reuse)
        return self.pictures.data.key if self.pictures else ""

    def _make_students(self, started_from: dict[str, Any] | None) -> Students:
        """The operators at their start, which is fitted to what is learned from first.

        For noise that is noise: on the bundled model's sixteen layers (64 px), the mean error on noise is 0.21 at step
        0 and 2 then, 0.32 and 0.30 with the teacher's projections alone, 0.33 and 0.29 if fitted to its activations.
        """
        operators = {name: build(config) for name, config in self.configs.items()}
        if self.settings.pretrained_weight:
            for name, operator in operators.items():
                operator.load_state_dict(self._pretrained[name][1])
        elif self.settings.init != "random" and started_from is None:
            batches = []
            if self.settings.init == "teacher":
                self.on_phase("fitting the operators' start to the teacher's attention")
                batches = self.lessons.first(self.global_batch, self.passes)
            try:
                for name, operator in operators.items():
                    operator.to(self.accelerator.device)
                    operator.start_from(self.attentions[name], [(batch[name].x, batch[name].size) for batch in batches])
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfMemory("out of memory while fitting the start: use --init projections") from error
                raise
        for operator in operators.values():
            operator.unfold()
        return Students(operators, self.attentions).to(self.accelerator.device)

    # -- the loop -----------------------------------------------------------------------------------

    def _train(self, step: int, last: int) -> int:
        """Trains to step ``last``, or until a signal asks for the end, and saves what is new."""
        s, began, overflows = self.settings, step, 0
        with interrupts.deferred("step") as asked:
            while step < last and not anywhere(self.accelerator, bool(asked())):
                lr = self.scheduler.get_last_lr()[0]
                loss, errors, mse, parts = self.updates.update(step)
                if self.accelerator.optimizer_step_was_skipped:  # float16 overflow: the loss scale was lowered
                    overflows += 1
                    if overflows > MAX_OVERFLOWS:
                        raise SdHyenaError(f"float16 overflows at step {step + 1} whatever the loss scale: use bf16")
                    continue
                overflows = 0
                step += 1
                self.average.update()
                on_noise = self.stage == 1 and s.learns_from_noise
                self._first_errors = self._first_errors or errors
                self.on_progress(Progress(step, s.total_steps, loss, errors, mse, lr, parts, on_noise))
                if step < last and s.save_every_n_steps and step % s.save_every_n_steps == 0:
                    self._save(step, {})
                    self._show(step)
            if step > began:  # else what is there may have its figures already
                self._save(step, {})
            self._signal = asked()  # while it was saved, too
            if self.accelerator.num_processes > 1:  # who was not told goes the same way as who was
                told = torch.tensor([self._signal], device=self.accelerator.device)
                self._signal = int(self.accelerator.gather(told).max())
        return step

    # -- measuring and saving -----------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> dict[str, dict[str, float]]:
        """Relative error and cosine per layer on held-out pictures or noise, the same inputs in every run."""
        self.students.leave_out(0, self.seed, 0)
        with self.average.in_place():
            return self._measure(self.students.eval())

    def _measure(self, students: Students) -> dict[str, dict[str, float]]:
        distances = {t.name: Distance() for t in self.targets}

        def measure(positions: Sequence[int]) -> dict[str, Distance]:
            records = self.measuring.held_out(positions)
            with self.accelerator.autocast():
                outputs = students(records)
            return {name: Distance.of(y, records[name].y) for name, y in outputs.items()}

        for positions in self.measuring.held_out_batches(VALIDATION_SAMPLES, self.settings.batch_size):
            for found in self.measured.run(measure, positions):
                for name, distance in found.items():
                    distances[name].merge(distance)
        students.train()
        return {name: distance.figures() for name, distance in distances.items()}

    def _save(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        """The weights after ``step`` updates, then the state to resume from."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        with self.average.in_place():
            self._save_weights(step, figures)
        self._save_state(step)

    def _save_state(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        save_state(
            self.out,
            {
                "step": step,
                "stage": self.stage,
                "micro_batch_size": self.updates.batches.size,
                "seed": self.seed,
                "settings": json.dumps(asdict(self.settings)),
                "identity": json.dumps(self.identity),
                "students": self.students.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scheduler": self.scheduler.scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
                "average": self.average.state_dict(),
            },
        )

    def _save_weights(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        measured_on = self.settings.measured_on
        training = asdict(self.settings) | {"seed": self.seed, "step": step, "measure_on": measured_on}
        if self.updates.batches.size < self.updates.batch_size:
            training["micro_batch_size"] = self.updates.batches.size
        operators = dict(self.students.items())
        for path, names in self._paths(step).items():
            origins = {name: Origin(figures.get(name, {}), self.teacher, training) for name in names}
            file = gather({name: operators[name] for name in names}, origins)
            written = self.claim.write(path, checkpoint.to_bytes(file, path))
            if written not in self.files:
                self.files.append(written)

    def _paths(self, step: int) -> dict[Path, list[str]]:
        """The files of a saved step, and the layers in each."""
        names, form = [target.name for target in self.targets], self.settings.name_format
        groups = [[name] for name in names] if "t" in used_fields(form) else [names]
        return {self.out / f"{form.format(s=step, t=group[0])}.safetensors": group for group in groups}

    def _show(self, step: int) -> None:
        """Lets the observer draw with what was just saved; who asked to stop is not kept waiting for it."""
        if self.accelerator.is_main_process and not interrupts.asked():
            with self.average.in_place():
                self.on_save(step, self.students)

    def _can_be(self, stage: int, step: int) -> bool:
        s = self.settings
        return 0 <= step <= s.n_steps if stage == 1 else s.n_steps <= step <= s.total_steps > s.n_steps

    def _check_same_run(self, state: dict[str, Any]) -> None:
        before = state["settings"] | state["identity"]
        now = asdict(self.settings) | self.identity
        changed = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
        if changed:
            pairs = ", ".join(f"{k} was {shown(before.get(k))}, is {shown(now[k])}" for k in changed[:5])
            more = " ..." if len(changed) > 5 else ""
            raise UsageError(f"cannot resume {self.out} with other settings: {pairs}{more}")
