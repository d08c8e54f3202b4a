"""A whole generation with a real pipeline: where its time goes, layer by layer, with and without Hyena."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import patch
from ..config import OperatorChoices, OperatorConfig
from ..errors import SdHyenaError, is_out_of_memory
from ..hyena_attention import HyenaAttention
from ..machine import free_memory, let_go
from ..nn import Operator, build
from ..nn.teacher import projections_of
from ..targets import Target, find_targets
from . import references
from .kinds import make_parts_tell
from .measure import GIB, SAMPLED, TOLERANCE, relative_error
from .memory import PeakOfRun
from .timing import Timing

TILED_FROM = 1024  # px above which the VAE decodes in tiles


@dataclass(frozen=True)
class Entry:
    """One way of running the pipeline. ``prepare`` makes it so and returns the layers replaced by Hyena."""

    name: str
    family: str  # "attention" or "hyena"
    prepare: Callable[[Any], list[str]]


@dataclass
class ImageRow:
    """One entry's generation. Times of ``layers`` and ``step`` (the whole UNet) in ms per step, ``seconds``
    per picture. ``error``: the largest relative RMS error of any layer against its definition."""

    entry: str
    family: str
    width: int
    height: int
    replaced: list[str] = field(default_factory=list)
    layers: dict[str, Timing] = field(default_factory=dict)
    step: Timing | None = None
    seconds: Timing | None = None
    step_ratio: float | None = None
    ratio: float | None = None
    unet_peak_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        """A flat row for JSON and CSV; layer times by name."""
        return {
            "kind": self.entry,
            "family": self.family,
            "width": self.width,
            "height": self.height,
            "replaced": " ".join(self.replaced),
            "s_per_image": self.seconds.median if self.seconds else None,
            "ratio": self.ratio,
            "ms": self.step.median if self.step else None,
            "ms_low": self.step.low if self.step else None,
            "ms_high": self.step.high if self.step else None,
            "step_ratio": self.step_ratio,
            "unet_peak_bytes": self.unet_peak_bytes,
            "peak_bytes": self.peak_bytes,
            "error": self.error,
            "note": self.note,
        } | {f"ms_{name}": timing.median for name, timing in self.layers.items()}


def attention_entry(name: str) -> Entry:
    """The unchanged model with self-attention by "sdpa", "naive" or "xformers"."""

    def prepare(pipe: Any) -> list[str]:
        from diffusers.models import attention_processor

        kinds = {"sdpa": "AttnProcessor2_0", "naive": "AttnProcessor", "xformers": "XFormersAttnProcessor"}
        patch.detach(pipe.unet)
        for target in find_targets(pipe.unet).values():
            pipe.unet.get_submodule(target.path).set_processor(getattr(attention_processor, kinds[name])())
        return []

    return Entry(name, "attention", prepare)


def hyena_entry(name: str, load: Callable[[Any], list[str]]) -> Entry:
    """A model with the layers replaced that ``load`` loads into a pipeline; SDPA elsewhere."""

    def prepare(pipe: Any) -> list[str]:
        attention_entry("sdpa").prepare(pipe)
        return load(pipe)

    return Entry(name, "hyena", prepare)


def untrained(targets: Sequence[Target], sample_size: int, choices: OperatorChoices) -> dict[str, Operator]:
    """Operators as they would be made for layers of a model whose latents are ``sample_size`` square."""
    operators = {}
    for target in targets:
        inner = 0 if target.inner_dim == target.dim else target.inner_dim
        height, width = target.grid((sample_size, sample_size))
        config = OperatorConfig(target.dim, height, width, inner, target.heads, **choices.choices())
        operators[target.name] = build(config)
        make_parts_tell(operators[target.name])
    return operators


def measure_image(
    pipe: Any,
    entries: Sequence[Entry],
    generate: Callable[[int], object],
    size: tuple[int, int],
    steps: int,
    repeats: int,
    images: int,
    phase: Callable[[str], None] = lambda text: None,
) -> list[ImageRow]:
    """Times ``generate(steps)``, which draws ``images`` pictures of ``size`` (height, width) px, in turns.

    Every attention and Hyena layer's first output is held to its definition beforehand. Raises SdHyenaError
    if one is off.
    """
    device = next(pipe.unet.parameters()).device
    if max(size) > TILED_FROM:
        pipe.vae.enable_tiling()
    rows = [ImageRow(entry.name, entry.family, size[1], size[0]) for entry in entries]
    runs: dict[str, list[Run]] = {entry.name: [] for entry in entries}
    for entry, row in zip(entries, rows, strict=True):
        phase(f"checking {entry.name}")
        row.note = _reason_to_skip(pipe, entry, size, images)
        if row.note:
            continue
        with _room_for(row):
            row.replaced = entry.prepare(pipe)
            with _checked(pipe.unet) as errors:
                generate(1)
            row.error = max(errors.values(), default=None)
    for turn in range(repeats):
        for entry, row in zip(entries, rows, strict=True):
            if row.note:
                continue
            phase(f"{entry.name}: generation {turn + 1} of {repeats}")
            with _room_for(row):
                entry.prepare(pipe)
                with Run.of(pipe.unet, device) as run:
                    generate(steps)
                runs[entry.name].append(run)
    patch.detach(pipe.unet)
    for row in rows:
        if runs[row.entry] and not row.note:
            _fill(row, runs[row.entry], images)
    _compare(rows)
    return rows


@contextmanager
def _room_for(row: ImageRow) -> Iterator[None]:
    """Notes it if memory runs out within: drawn with less, an entry would be timed as another one than it is."""
    failure = None
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        row.note, failure = "skipped: out of memory", error
    if failure is not None:
        let_go(failure)


def _reason_to_skip(pipe: Any, entry: Entry, size: tuple[int, int], images: int) -> str:
    if entry.name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError:
            return "not available: xformers is not installed"
        if next(pipe.unet.parameters()).device.type != "cuda":
            return "not available: xformers needs a GPU"
    if entry.name == "naive":
        weight, device = next(pipe.unet.parameters()), next(pipe.unet.parameters()).device
        targets = find_targets(pipe.unet).values()
        latent = size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor
        squares = max(t.heads * (t.grid(latent)[0] * t.grid(latent)[1]) ** 2 for t in targets)
        needed, free = 3 * 2 * images * squares * weight.element_size(), free_memory(device)
        if needed > 0.8 * free:
            return f"skipped: needs about {needed / GIB:.1f} GiB for one layer, {free / GIB:.1f} GiB are free"
    return ""


@contextmanager
def _checked(unet: nn.Module) -> Iterator[dict[str, float]]:
    """Within, every self-attention layer's first output is compared with its definition; errors by name."""
    errors: dict[str, float] = {}
    handles = []

    def check(name: str, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if name in errors:
            return
        x = args[0] if args else kwargs["hidden_states"]
        tokens = torch.randperm(x.shape[1], device=x.device)[:SAMPLED]
        with torch.no_grad():
            expected = _expected(layer, x.double(), tokens, kwargs.get("attention_mask"))
        errors[name] = error = relative_error(output[:, tokens], expected)
        if not error <= TOLERANCE[x.dtype]:
            raise SdHyenaError(
                f"layer {name} is off by {error:.1e} (relative RMS) from its definition: no times are reported"
            )

    try:
        for name, target in find_targets(unet).items():
            layer = unet.get_submodule(target.path)

            def hook(layer: Any, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
                check(name, layer, args, kwargs, output)

            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def _expected(layer: Any, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """What the layer should return at ``tokens``."""
    if isinstance(layer, HyenaAttention):
        assert mask is not None
        given = projections_of(layer) if layer.operator.core else None
        return layer.operator.expected(x, (mask.shape[1], mask.shape[2]), tokens, given)
    return references.attention(x, projections_of(layer), layer.heads, tokens)


class Run:
    """Times of one generation: every self-attention layer, every UNet call, and all of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: dict[str, list[tuple[Any, Any]]] = {}
        self.seconds = 0.0
        self.peak = self.unet_peak = 0

    @classmethod
    @contextmanager
    def of(cls, unet: nn.Module, device: torch.device) -> Iterator[Run]:
        """A run that watches ``unet``'s layers while inside."""
        run, handles = cls(device), []
        memory = PeakOfRun(device)
        watched = {name: unet.get_submodule(target.path) for name, target in find_targets(unet).items()}
        for name, module in (watched | {"": unet}).items():
            started: list[Any] = []
            handles.append(module.register_forward_pre_hook(lambda *_, started=started: started.append(run._now())))
            handles.append(
                module.register_forward_hook(
                    lambda *_, name=name, started=started: run.marks.setdefault(name, []).append(
                        (started.pop(), run._now())
                    )
                )
            )

        def note_peak(*_: Any) -> None:
            run.unet_peak = memory.peak()

        handles.append(unet.register_forward_hook(note_peak))
        memory.reset()
        began = time.perf_counter()
        try:
            yield run
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            run.seconds = time.perf_counter() - began
            run.peak = memory.peak()
        finally:
            for handle in handles:
                handle.remove()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, list[float]]:
        """By layer name; the whole UNet's under ""."""
        if self.device.type == "cuda":
            return {name: [a.elapsed_time(b) for a, b in marks] for name, marks in self.marks.items()}
        return {name: [1000 * (b - a) for a, b in marks] for name, marks in self.marks.items()}


def _fill(row: ImageRow, runs: Sequence[Run], images: int) -> None:
    times: dict[str, list[float]] = {}
    for run in runs:
        for name, values in run.milliseconds().items():
            times.setdefault(name, []).extend(values)
    row.step = Timing.of(times.pop(""))
    row.layers = {name: Timing.of(values) for name, values in times.items()}
    row.seconds = Timing.of([run.seconds / images for run in runs])
    row.peak_bytes, row.unet_peak_bytes = max(r.peak for r in runs), max(r.unet_peak for r in runs)


def _compare(rows: Sequence[ImageRow]) -> None:
    """Ratios of times per UNet step and per picture to the fastest attention's."""
    attention = [row for row in rows if row.family == "attention" and row.step and row.seconds]
    if not attention:
        return
    best = min(attention, key=lambda row: row.seconds.median)  # type: ignore[union-attr]
    for row in rows:
        if row.step and row.seconds:
            row.step_ratio = best.step.median / row.step.median  # type: ignore[union-attr]
            row.ratio = best.seconds.median / row.seconds.median  # type: ignore[union-attr]
