"""The training loop: one teacher forward pass feeds all selected layers; Accelerate runs the optimisation."""

from __future__ import annotations

import json
import logging
import math
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .. import checkpoint
from ..errors import SdHyenaError, UsageError
from ..names import used_fields
from ..nn import OperatorConfig
from ..targets import find_targets, select
from .lessons import Lessons
from .losses import Distance, variance
from .prepare import training_data
from .settings import TrainSettings
from .state import load_state, save_state
from .students import Students, configure, start_from_teacher

START_BATCHES = 2  # teacher batches on which mean attention is measured
VALIDATION_PICTURES = 64
# Settings that may differ between a run and its resumption; all others must be the same.
MAX_OVERFLOWS = 40
MAY_CHANGE = {"log_dir", "out_dir", "data_dir", "save_every_n_steps", "device", "seed"}
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a training run tells its observer after each update."""

    step: int
    total: int
    relative_error: dict[str, float]
    mse: dict[str, float]
    lr: float

    @property
    def loss(self) -> float:
        """What was minimised: the mean relative error over the layers."""
        return sum(self.relative_error.values()) / len(self.relative_error)


@dataclass
class Result:
    """What a run ends with: per layer, figures on held-out batches; the files written; whether cut short."""

    figures: dict[str, dict[str, float]]
    configs: dict[str, OperatorConfig]
    files: list[Path]
    step: int
    interrupted: int = 0  # the signal's number
    seconds: float = 0.0
    seed: int = 0


class Trainer:
    """Teaches the operators of the selected layers of one pipeline.

    ``on_progress`` is called after every update, ``on_phase`` with a line for each longer phase, ``on_save``
    after each save with the step and the students, ``on_prepare`` with the number of pictures there, and of
    how many, while the teacher draws.
    """

    def __init__(
        self,
        settings: TrainSettings,
        pipe: Any,
        teacher: dict[str, str],
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
        self.global_batch = settings.batch_size * accelerator.num_processes
        self.configs = self._configure()
        self._signal = 0
        self.files: list[Path] = []

    def run(self, resume: bool = False) -> Result:
        """Trains to the last step, or until SIGINT or SIGTERM; then saves. Raises SdHyenaError if the loss
        stops being finite, leaving the last good files in place."""
        started = time.time()
        state = load_state(self.out) if resume else None
        if resume and state is None:
            self.on_phase(f"nothing to resume in {self.out}: starting at step 0")
        self.seed = self._choose_seed(state)
        torch.manual_seed(self.seed)
        data = self._prepare_inputs()
        # What must be the same when the run is resumed, besides the settings.
        self.identity = {
            "teacher": self.teacher,
            "data": data,
            "processes": self.accelerator.num_processes,
        }
        students = self._make_students(started_from=state)
        self.variances = self._measure_variances()
        optimizer = self._optimizer(students)
        scheduler = self._scheduler(optimizer)
        step = 0
        if state is not None:
            self._check_same_run(state)
            step = state["step"]
            students.load_state_dict(state["students"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.on_phase(f"resuming at step {step}")
        self.students, self.optimizer, self.scheduler = self.accelerator.prepare(students, optimizer, scheduler)
        step = self._train(step)
        self._save(step, {})
        figures = {}
        if not self._signal:
            figures = self._evaluate()
            self._save(step, figures)  # the same weights again, now with their figures
            self._show(step)
        return Result(figures, self.configs, self.files, step, self._signal, time.time() - started, self.seed)

    # -- setting up ---------------------------------------------------------------------------------

    def _configure(self) -> dict[str, OperatorConfig]:
        if self.settings.pretrained_weight:
            return self._pretrained_configs()
        choices = self.settings.operator_choices()
        return {t.name: configure(t, self.grid, self.pipe.unet, **choices) for t in self.targets}

    def _pretrained_configs(self) -> dict[str, OperatorConfig]:
        from ..api import choose_layers

        path = self.settings.pretrained_weight
        file = self._pretrained = checkpoint.load(path)
        chosen = choose_layers(self.pipe.unet, file, self.settings.target)
        missing = [t.name for t in self.targets if t.name not in chosen.values()]
        if missing:
            raise UsageError(f"{path}: holds no layer {', '.join(missing)}; it has {', '.join(file.layers)}")
        self._stored_name = {target: stored for stored, target in chosen.items()}
        logger.warning(
            "%s sets the operators: the --hyena_*, --operator, --form, --global_branch and --init options do not apply",
            path,
        )
        return {target: file.layers[stored].config for stored, target in chosen.items()}

    def _choose_seed(self, state: dict[str, Any] | None) -> int:
        given = self.settings.seed
        if state is None:
            drawn = [given if given >= 0 else random.SystemRandom().randrange(2**31)]
            return broadcast_object_list(drawn)[0]
        if given not in (-1, state["seed"]):
            raise UsageError(f"cannot resume {self.out} with seed {given}: the run's seed is {state['seed']}")
        return state["seed"]

    def _prepare_inputs(self) -> str:
        """Opens what is to be learned from, drawn by the teacher first where needed; returns its identity."""
        s = self.settings
        with self.accelerator.main_process_first():
            data = training_data(s, self.pipe, self.teacher, self.is_demo, self.on_phase, self.on_prepare)
        self.lessons = Lessons(self.pipe, self.targets, data, self.seed, s.data == "noise", s.unconditional)
        return data.key

    def _make_students(self, started_from: dict[str, Any] | None) -> Students:
        operators = {name: config.build() for name, config in self.configs.items()}
        if self.settings.pretrained_weight:
            for name, operator in operators.items():
                operator.load_state_dict(self._pretrained.tensors[self._stored_name[name]])
        elif self.settings.init == "teacher" and started_from is None:
            self.on_phase("measuring the teacher's mean attention to start from")
            batches = [self.lessons.activations(-1 - i, range(self.global_batch)) for i in range(START_BATCHES)]
            for name, operator in operators.items():
                operator.to(self.accelerator.device)
                start_from_teacher(operator, self.attentions[name], [batch[name] for batch in batches])
        return Students(operators, self.attentions).to(self.accelerator.device)

    def _measure_variances(self) -> dict[str, float]:
        """What each layer's loss is divided by, from batches that every process and every resumption shares."""
        batches = [self.lessons.training(-1 - i, range(self.global_batch)) for i in range(START_BATCHES)]
        return {t.name: sum(variance(batch[t.name].y) for batch in batches) / len(batches) for t in self.targets}

    def _optimizer(self, students: Students) -> torch.optim.Optimizer:
        groups = []
        for _, operator in students.items():
            decayed = [p for n, p in operator.named_parameters() if n.startswith(("in_proj.weight", "out_proj.weight"))]
            chosen = {id(p) for p in decayed}
            groups.append({"params": decayed, "weight_decay": self.settings.weight_decay})
            groups.append({"params": [p for p in operator.parameters() if id(p) not in chosen], "weight_decay": 0.0})
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.settings.lr)

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        from diffusers.optimization import get_scheduler

        # Accelerate steps the schedule once per process at each update.
        scale = self.accelerator.num_processes
        return get_scheduler(
            self.settings.lr_scheduler,
            optimizer,
            num_warmup_steps=min(self.settings.lr_warmup_steps, self.settings.n_steps) * scale,
            num_training_steps=self.settings.n_steps * scale,
        )

    # -- the loop -----------------------------------------------------------------------------------

    def _train(self, step: int) -> int:
        s = self.settings
        # Only a main thread may handle signals; elsewhere the host program decides what they mean.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        overflows = 0
        try:
            while step < s.n_steps and not self._anywhere(bool(self._signal)):
                lr = self.scheduler.get_last_lr()[0]
                errors, mse = self._update(step)
                if self.accelerator.optimizer_step_was_skipped:  # float16 overflow: the loss scale was lowered
                    overflows += 1
                    if overflows > MAX_OVERFLOWS:
                        raise SdHyenaError(f"float16 overflows at step {step + 1} whatever the loss scale: use bf16")
                    continue
                overflows = 0
                step += 1
                self.on_progress(Progress(step, s.n_steps, errors, mse, lr))
                if step < s.n_steps and s.save_every_n_steps and step % s.save_every_n_steps == 0:
                    self._save(step, {})
                    self._show(step)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return step

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        self.on_phase("stopping after this step (once more: at once)")

    def _update(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One update; relative error and mean squared error per layer, averaged over the global batch."""
        s, accelerator = self.settings, self.accelerator
        parts = s.gradient_accumulation_steps
        first = accelerator.process_index * s.batch_size
        errors: dict[str, Tensor] = {}
        mse: dict[str, Tensor] = {}
        for part in range(parts):
            start = part * self.global_batch + first
            records = self.lessons.training(step, range(start, start + s.batch_size))
            with accelerator.accumulate(self.students):
                with accelerator.autocast():
                    outputs = self.students(records)
                losses = []
                for name, y in outputs.items():
                    square = torch.nn.functional.mse_loss(y.float(), records[name].y.float())
                    losses.append(square / self.variances[name])
                    mse[name] = mse.get(name, 0) + square.detach() / parts
                    errors[name] = errors.get(name, 0) + losses[-1].detach() / parts
                accelerator.backward(torch.stack(losses).mean())
                if accelerator.sync_gradients:
                    self._check_finite(step, "loss", errors)
                    self._check_finite(step, "gradient", self._clip_gradients())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self._over_processes(errors), self._over_processes(mse)

    def _over_processes(self, values: dict[str, Tensor]) -> dict[str, float]:
        return {name: self.accelerator.reduce(value, "mean").item() for name, value in values.items()}

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Limits each layer's gradient on its own, so that one layer's trouble is not the others'. Returns
        the norms to be checked: none in float16, where Accelerate's loss scaling expects some overflows."""
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.settings.max_grad_norm or math.inf
        layers = self.accelerator.unwrap_model(self.students).items()
        norms = {name: torch.nn.utils.clip_grad_norm_(operator.parameters(), limit) for name, operator in layers}
        return {} if self.accelerator.scaler is not None else norms

    def _anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process: all must act on it together, or the others would wait."""
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum").item() > 0

    def _check_finite(self, step: int, what: str, values: dict[str, Tensor]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value.item())]
        if self._anywhere(bool(bad)):
            bad = bad or ["another process"]
            last = f"; the last good file is {self.files[-1]}" if self.files else ""
            raise SdHyenaError(
                f"the {what} of {', '.join(bad)} is not finite at step {step + 1} (seed {self.seed}): lower --lr{last}"
            )

    # -- measuring and saving -----------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> dict[str, dict[str, float]]:
        """Relative error and cosine per layer on held-out latents, the same inputs in every run."""
        students = self.accelerator.unwrap_model(self.students).eval()
        distances = {t.name: Distance() for t in self.targets}
        for positions in self.lessons.held_out_batches(VALIDATION_PICTURES, self.settings.batch_size):
            records = self.lessons.held_out(positions)
            with self.accelerator.autocast():
                outputs = students(records)
            for name, y in outputs.items():
                distances[name].add(y, records[name].y)
        students.train()
        return {name: distance.figures() for name, distance in distances.items()}

    def _save(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        """The weights after ``step`` updates, then the state to resume from."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        students = self.accelerator.unwrap_model(self.students)
        training = asdict(self.settings) | {"seed": self.seed, "step": step}
        operators = {name: (self.configs[name], operator) for name, operator in students.items()}
        each = "t" in used_fields(self.settings.name_format)
        groups = [[name] for name in operators] if each else [list(operators)]
        for names in groups:
            path = self.out / (self.settings.name_format.format(s=step, t=names[0]) + ".safetensors")
            checkpoint.save(
                path, {n: operators[n] for n in names}, teacher=self.teacher, training=training, figures=figures
            )
            if path not in self.files:
                self.files.append(path)
        save_state(
            self.out,
            {
                "step": step,
                "seed": self.seed,
                "settings": json.dumps(asdict(self.settings)),
                "identity": json.dumps(self.identity),
                "students": students.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scheduler": self.scheduler.scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            },
        )

    def _show(self, step: int) -> None:
        """Lets the observer draw with what was just saved; who asked to stop is not kept waiting for it."""
        if self.accelerator.is_main_process and not self._signal:
            self.on_save(step, self.accelerator.unwrap_model(self.students))

    def _check_same_run(self, state: dict[str, Any]) -> None:
        before = json.loads(state["settings"]) | json.loads(state["identity"])
        now = asdict(self.settings) | self.identity
        changed = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
        if changed:
            pairs = ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in changed)
            raise UsageError(f"cannot resume {self.out} with other settings: {pairs}")
