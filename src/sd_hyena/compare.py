"""One picture twice, with a model's attention and with Hyena layers, and what each took: the page without the page."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from . import checkpoint, patch
from .benchmark.image import Run
from .benchmark.timing import Timing
from .errors import SdHyenaError, UsageError
from .evaluate.pictures import psnr, ssim
from .fingerprint import HASH, difference, fingerprint
from .generate.draw import attach_entry, parameters_text, to_png
from .generate.hires import draw_stages, pipelines
from .generate.memory import spare_vae
from .generate.samplers import check_steps, use_scheduler
from .generate.settings import GenerateSettings
from .generate.stages import stages
from .layer_choice import choose_layers
from .models import check_size
from .targets import find_targets
from .texts import check_text, one_line, shortened

TEACHER, STUDENT = "attention", "Hyena"
EVEN = 0.05  # a ratio this close to 1 is no difference
Progress = Callable[[str, int, int], None]  # who draws, the step that is done, of how many


def _no_progress(who: str, done: int, total: int) -> None:
    pass


class Cancelled(SdHyenaError):
    """The drawing was called off; nothing of it is kept."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished picture, its file's name without an ending, its ``parameters`` text, and what it took: seconds in all,
    milliseconds a step in the UNet (the median), and bytes as :data:`..benchmark.memory.RUN_METHOD` counts them."""

    image: Image.Image
    name: str
    parameters: str
    seconds: float
    step_ms: float
    peak_bytes: int

    def png(self) -> bytes:
        """A PNG file's contents, which say how the picture was drawn."""
        return to_png(self.image, self.parameters)


@dataclass(frozen=True)
class Comparison:
    """A teacher's picture and its student's, with ``layers`` of ``file`` in attention's place. PSNR in dB."""

    settings: GenerateSettings
    file: str
    layers: tuple[str, ...]
    teacher: Picture
    student: Picture
    psnr: float
    ssim: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the teacher's the student's whole picture is; below 1: slower."""
        return self.teacher.seconds / self.student.seconds

    @property
    def step_ratio(self) -> float:
        """The same of a step."""
        return self.teacher.step_ms / self.student.step_ms

    def verdict(self) -> str:
        """A sentence or two: whether Hyena pays here, by the time of a step, and where it would."""
        count = f"{len(self.layers)} Hyena layer{'s' * (len(self.layers) > 1)}"
        took = f"a step takes {self.student.step_ms:.0f} ms with {count}, {self.teacher.step_ms:.0f} ms with attention"
        where = f"at {self.settings.width} x {self.settings.height} px"
        if self.step_ratio > 1 + EVEN:
            return f"Hyena pays {where}: {took}, {self.step_ratio:.2f} times the speed."
        why = "Attention's time grows with the square of a picture's area, Hyena's with the area: draw larger."
        if self.step_ratio < 1 - EVEN:
            return f"Hyena does not pay {where}: {took}, {self.step_ratio:.2f} times the speed. {why}"
        return f"Hyena makes no difference {where}: {took}. {why}"

    @classmethod
    def of(
        cls, settings: GenerateSettings, file: str, layers: Sequence[str], teacher: Picture, student: Picture
    ) -> Comparison:
        """With how far apart the two pictures are."""
        alike = psnr(teacher.image, student.image), ssim(teacher.image, student.image)
        return cls(settings, file, tuple(layers), teacher, student, *alike)


@dataclass(frozen=True)
class Offer:
    """What a file has for a model: each layer's error on held-out latents, if that was recorded, by name and in running
    order; and a line on where the layers are from."""

    errors: dict[str, float | None]
    origin: str


class Studio:
    """A pipeline on ``device`` that draws with its attention and with Hyena layers, one picture at a time; ``model`` is
    what it is called.

    The teacher's last picture is kept: where only the student changes, only the student draws.
    """

    def __init__(self, pipe: Any, model: str, device: str = "cpu") -> None:
        self.pipe, self.model, self.device = pipe, model, torch.device(device)
        self.targets = find_targets(pipe.unet)
        self.cell = pipe.vae_scale_factor  # px of a latent cell
        self._scheduler = pipe.scheduler
        self._hash = fingerprint(pipe)[HASH][:10]
        self._kept: tuple[GenerateSettings, Picture] | None = None
        self._one_at_a_time, self._called_off = threading.Lock(), threading.Event()

    @property
    def sampler(self) -> str:
        """The model's own sampler, by the name that pictures are marked with."""
        return type(self._scheduler).__name__.removesuffix("Scheduler")

    def settings(self, **wanted: Any) -> GenerateSettings:
        """What is wanted, as numbers or as text, checked; a seed below 0 becomes one drawn at random. Raises UsageError
        for the first value that cannot be."""
        fields = GenerateSettings.__dataclass_fields__
        values = {name: _as(str(fields[name].type), name, value) for name, value in wanted.items()}
        settings = GenerateSettings(model=self.model, num_images=1, overwrite=True, **values)
        for name in ("prompt", "negative_prompt"):
            check_text(name, getattr(settings, name))
        for name, value in values.items():
            choices = fields[name].metadata["choices"]
            if choices and value not in choices:
                raise UsageError(f"{name}: {shortened(value)!r} is none of {', '.join(choices)}")
        settings.validate()
        check_size(self.model, settings.width, settings.height, self.cell)
        check_steps(settings.scheduler, settings.steps, self._scheduler.config)
        if settings.seed < 0:
            settings = replace(settings, seed=random.SystemRandom().randrange(2**31))
        return settings

    def offer(self, file: str) -> Offer:
        """What a Hyena file, or "demo", has for this model. Raises CheckpointError for what is no such file, UsageError
        for one that does not fit."""
        held = checkpoint.load(file)
        names = choose_layers(self.targets, held, None)
        errors = {name: held.layers[name].figures.get("relative_error") for name in self.targets if name in names}
        origins = {held.layers[name].config.label: held.origin(name) for name in errors}
        first = next(iter(origins.values()))
        said = [f"{len(errors)} of {len(self.targets)} layers", " and ".join(origins)]
        for key, words in (("teacher_model", "taught by {}"), ("n_steps", "in {} steps")):
            if value := first.training.get(key):
                said.append(words.format(str(value)[:80]))
        further = max(difference(held.origin(name).teacher, self.pipe.unet) for name in errors)
        if further:
            said.append(f"but by another model: its attention's weights differ by {100 * further:.3g}%")
        return Offer(errors, one_line(", ".join(said)))

    def start(self) -> None:
        """Ends what is still being drawn, for a page that is gone, and forgets an earlier :meth:`cancel`."""
        self.cancel()
        with self._one_at_a_time:
            self._called_off.clear()

    def cancel(self) -> None:
        """Has what is being drawn end at its next step, with :class:`Cancelled`."""
        self._called_off.set()

    def compare(
        self, settings: GenerateSettings, file: str, layers: Sequence[str], progress: Progress = _no_progress
    ) -> Iterator[Picture | Comparison]:
        """The teacher's picture as soon as there is one, then both with ``layers`` of ``file`` in attention's place.

        Raises, before anything is drawn, UsageError if there is no layer or one does not fit and CheckpointError for an
        unusable file; then Cancelled, NotFiniteError and OutOfMemory.
        """
        with self._one_at_a_time:
            with self._attached(settings, file, layers):
                pass
            if self._kept is None or self._kept[0] != settings:
                self._kept = settings, self._draw(settings, TEACHER, (), (), progress)
            teacher = self._kept[1]
            yield teacher
            with self._attached(settings, file, layers) as replaced:
                student = self._draw(settings, STUDENT, (file,), replaced, progress)
        yield Comparison.of(settings, file, replaced, teacher, student)

    @contextlib.contextmanager
    def _attached(self, settings: GenerateSettings, file: str, layers: Sequence[str]) -> Iterator[list[str]]:
        if not layers:
            raise UsageError("no layer is chosen: choose at least one for Hyena")
        try:
            replaced = attach_entry(self.pipe, [file], replace(settings, target=",".join(layers)))
            patch.check_grid(self.pipe.unet, (settings.height // self.cell, settings.width // self.cell))
            yield replaced
        finally:
            patch.detach(self.pipe.unet)

    def _draw(
        self, settings: GenerateSettings, who: str, files: Sequence[str], layers: Sequence[str], progress: Progress
    ) -> Picture:
        pipe = self.pipe
        pipe.scheduler = self._scheduler
        use_scheduler(pipe, settings.scheduler, settings.steps)
        if hasattr(pipe.vae, "disable_tiling"):  # an earlier picture may have been larger
            pipe.vae.disable_tiling()
        spare_vae(pipe, str(self.device), settings.vae_tiling, stages(settings), 1)
        plan = pipelines(pipe, settings)
        with self._watched(who, progress), Run.of(pipe.unet, self.device) as run:
            (image,) = draw_stages(plan, settings, [settings.prompt], [settings.seed])
        step = Timing.of(run.milliseconds()[""]).median * pipe.scheduler.order
        text = parameters_text(pipe, settings, settings.seed, self._hash, files, layers)
        name = f"{who.lower()}-{settings.width}x{settings.height}-seed-{settings.seed}"
        return Picture(image, name, text, run.seconds, step, run.peak)

    @contextlib.contextmanager
    def _watched(self, who: str, progress: Progress) -> Iterator[None]:
        """Within, ``progress`` is told of every step, and a step is where drawing ends when it is called off. A step
        may call the UNet more than once."""
        calls = 0

        def after(*_: Any) -> None:
            nonlocal calls
            calls += 1
            order = self.pipe.scheduler.order
            done, total = -(-calls // order), -(-self.pipe.num_timesteps // order)
            if self._called_off.is_set():
                raise Cancelled(f"cancelled: {who}, step {done} of {total}")
            progress(who, done, total)

        handle = self.pipe.unet.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def _as(kind: str, name: str, value: Any) -> Any:
    """A value as the type of its setting. Raises UsageError."""
    if kind == "str":
        return "" if value is None else str(value)
    try:
        return float(value) if kind == "float" else int(str(value).strip())
    except (TypeError, ValueError):
        what = "number" if kind == "float" else "whole number"
        raise UsageError(f"{name}: give a {what}") from None
