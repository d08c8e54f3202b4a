"""The evaluation itself: one teacher, any number of students, every figure of each in one row."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .. import patch
from ..errors import SdHyenaError, UsageError
from ..finite import first_not_finite, why_not_finite
from ..generate.draw import attach_entry
from ..generate.sampling import NotFiniteError
from ..generate.settings import GenerateSettings
from ..generate.sparing import Sparing
from ..machine import free_memory, machine
from ..models import check_size
from ..settings import to_flags
from ..targets import find_targets
from .errors import Figures, TeacherSweep
from .inputs import HeldOut
from .pictures import Distances, Drawing, compare, draw
from .scores import Score, make_scores
from .settings import EvaluateSettings
from .yardstick import BACKEND, yardsticks

TEACHER = "teacher"
logger = logging.getLogger(__name__)


@dataclass
class Row:
    """One line of the table. ``kind``: "teacher", "yardstick" or "student".

    ``distances``, ``unet`` and ``layers`` are from the teacher, whose own row has none; ``layers`` is filled for
    students. ``unet`` and ``layers`` are empty if error figures were not asked for.
    """

    label: str
    kind: str
    drawing: Drawing
    files: list[str] = field(default_factory=list)
    distances: Distances | None = None
    unet: dict[str, Figures] = field(default_factory=dict)
    layers: dict[str, Figures] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def layer_error(self) -> float | None:
        """The layers' mean relative error."""
        values = [figures["relative_error"] for figures in self.layers.values()]
        return sum(values) / len(values) if values else None

    def figures(self) -> dict[str, Any]:
        """Everything measured, as plain numbers."""
        record: dict[str, Any] = {"label": self.label, "kind": self.kind, "files": self.files}
        if self.distances is not None:
            record |= self.distances.figures() | {"pictures": asdict(self.distances)}
        for name in ("unet", "layers", "scores"):
            if getattr(self, name):
                record[name] = getattr(self, name)
        if self.layers:
            record["layer_error_mean"] = self.layer_error
        return record | {"seconds": self.drawing.seconds}


@dataclass
class Evaluation:
    """Everything measured. ``rows`` starts with the teacher; ``bands`` are the first and last timestep of each."""

    settings: EvaluateSettings
    prompts: list[str]
    seeds: list[int]
    bands: list[tuple[int, int]]
    rows: list[Row]
    machine: dict[str, Any]

    @property
    def teacher(self) -> Row:
        return self.rows[0]

    @property
    def students(self) -> list[Row]:
        """In the table's order."""
        return [row for row in self.rows if row.kind == "student"]

    @property
    def ranking(self) -> list[int]:
        """Positions of the pictures from the first student's best PSNR to its worst."""
        psnr = _distances(self.students[0]).psnr
        return sorted(range(len(psnr)), key=lambda i: -psnr[i])

    def figures(self) -> dict[str, Any]:
        """Everything measured, as plain numbers: what evaluation.json holds."""
        return {
            "machine": self.machine,
            "command": command(self.settings),
            "settings": asdict(self.settings),
            "prompts": self.prompts,
            "seeds": self.seeds,
            "bands": self.bands,
            "rows": [row.figures() for row in self.rows],
        }


def _distances(row: Row) -> Distances:
    assert row.distances is not None, "only the teacher's own row has no distances"
    return row.distances


def command(settings: EvaluateSettings) -> str:
    """The command line that these settings came from, or could have."""
    return f"sd-hyena evaluate {to_flags(settings, omit=['overwrite'])}".strip()


def evaluate(
    pipe: Any,
    students: Mapping[str, Sequence[Path | str]],
    settings: EvaluateSettings,
    prompts: Sequence[str] | None = None,
    scores: Sequence[Score] | None = None,
    phase: Callable[[str], None] = logger.info,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measures students against the teacher in ``pipe``; the same pipeline and arguments give the same figures.

    Args:
        pipe: a pipeline whose UNet is the teacher's; Hyena layers attached to it are taken off, and none is left.
        students: the Hyena files of each, stacked, by the name it shall have in the table; at least one.
        settings: size, steps, guidance, seed, bands and so on; its ``hyena`` is not read.
        prompts: what to draw; ``settings.read_prompts()`` unless given.
        scores: ``make_scores(...)`` of these settings and prompts unless given.
        phase: is told in a line what happens now; ``progress`` how many pictures or UNet calls of how many are done.

    Raises UsageError or CheckpointError if a file does not fit, SdHyenaError if a score cannot be had.
    """
    if not students:
        raise UsageError("there is no student to evaluate: name at least one Hyena file")
    check_size(settings.model, settings.width, settings.height, pipe.vae_scale_factor)
    prompts = list(settings.read_prompts() if prompts is None else prompts)
    seeds = [settings.seed + i for i in range(len(prompts))]
    if scores is None:
        scores = make_scores(settings, prompts, str(pipe.unet.device))
    files = {label: list(map(str, entry)) for label, entry in students.items()}
    drawing = settings.drawing()
    with Sparing(pipe) as sparing:
        work = _Work(pipe, settings, prompts, seeds, scores, phase, progress, sparing)
        try:
            operators = {label: _operators(pipe, entry, drawing) for label, entry in files.items()}
            return work.evaluate(files, operators)
        finally:
            patch.detach(pipe.unet)


def _operators(pipe: Any, files: Sequence[str], settings: GenerateSettings) -> dict[str, nn.Module]:
    """The operators of one student, checked against the UNet and the size, on the UNet's device."""
    attach_entry(pipe, files, settings)
    factor = pipe.vae_scale_factor
    patch.check_grid(pipe.unet, (settings.height // factor, settings.width // factor))
    operators = {name: layer.operator for name, layer in patch.attached(pipe.unet).items()}
    patch.detach(pipe.unet)
    return operators


class _Work:
    """What the steps of one evaluation share."""

    def __init__(
        self,
        pipe: Any,
        settings: EvaluateSettings,
        prompts: list[str],
        seeds: list[int],
        scores: Sequence[Score],
        phase: Callable[[str], None],
        progress: Callable[[int, int], None],
        sparing: Sparing,
    ) -> None:
        self.pipe, self.settings, self.prompts, self.seeds = pipe, settings, prompts, seeds
        self.scores, self.phase, self.progress, self.sparing = scores, phase, progress, sparing
        self.device = pipe.unet.device  # where it computes, wherever its weights may wait later
        self.teacher: Drawing | None = None
        self.sweep: TeacherSweep | None = None

    def evaluate(self, files: Mapping[str, list[str]], operators: Mapping[str, dict[str, nn.Module]]) -> Evaluation:
        rows = [self.row(TEACHER, TEACHER)]
        self.teacher = rows[0].drawing
        s = self.settings
        inputs = HeldOut(self.pipe, self.teacher.latents, self.prompts, s.bands, s.layer_samples)
        if s.layer_samples:
            self.phase(f"measuring errors at {len(inputs.edges)} x {s.layer_samples} noised latents")
            self.sweep = TeacherSweep(self.pipe, inputs, operators, self.progress)
        for label, change in ({} if s.no_yardstick else yardsticks(self.pipe.unet)).items():
            if label == BACKEND and not self._fits_in_memory():
                continue
            with change:
                rows.append(self.row(f"teacher, {label}", "yardstick"))
        for label, layers in operators.items():
            with self._attached(layers):
                row = self.row(label, "student", files[label], ", ".join(layers))
            row.layers = self.sweep.layers[label] if self.sweep else {}
            rows.append(row)
        for row in rows:
            if name := first_not_finite(row.figures()):
                raise SdHyenaError(f"{row.label}: {name} is not finite: {why_not_finite(self.pipe)}")
        return Evaluation(s, self.prompts, self.seeds, inputs.edges, rows, machine(str(self.device)))

    def row(self, label: str, kind: str, files: Sequence[str] = (), replaced: str = "") -> Row:
        """Draws with the UNet as it stands, and measures that."""
        self.phase(f"drawing {len(self.prompts)} prompts: {label}" + (f"; replaced: {replaced}" if replaced else ""))
        options = self.settings.drawing().sampling_options()
        try:
            drawing = draw(self.pipe, self.prompts, self.seeds, self.progress, self.sparing, **options)
            row = Row(label, kind, drawing, list(files))
            if self.teacher is not None:
                row.distances = compare(self.teacher, drawing)
            if self.sweep is not None:
                row.unet = self.sweep.unet_errors(self.settings.cfg_scale)
        except NotFiniteError as error:
            raise SdHyenaError(f"{label}: {error}") from None
        for score in self.scores:
            row.scores |= score(drawing, self.teacher, self.prompts)
        return row

    @contextlib.contextmanager
    def _attached(self, operators: Mapping[str, nn.Module]) -> Any:
        patch.attach(self.pipe.unet, operators)
        try:
            yield
        finally:
            patch.detach(self.pipe.unet)

    def _fits_in_memory(self) -> bool:
        """Whether the attention matrix of one head fits, which the other backend writes down."""
        latent = self.settings.height // self.pipe.vae_scale_factor, self.settings.width // self.pipe.vae_scale_factor
        tokens = max(h * w for h, w in (t.grid(latent) for t in find_targets(self.pipe.unet).values()))
        needed = 3 * tokens**2 * next(self.pipe.unet.parameters()).element_size()
        if needed < free_memory(self.device):
            return True
        logger.warning(
            "left out: the teacher with %s: its attention matrices need %.0f GiB at this size", BACKEND, needed / 2**30
        )
        return False
