"""Measuring one layer of each kind at one shape: built, checked, then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SdHyenaError, is_out_of_memory
from ..machine import free_memory
from ..texts import reason
from .kinds import KINDS, Kind, Shape
from .memory import peak_of_call
from .timing import Timing, interleaved, stopwatch

SAMPLED = 16  # tokens at which a layer is held to its definition
# Largest relative RMS error at those tokens.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
GIB = 2**30


@dataclass
class Limits:
    """``repeats`` rounds at most, none after ``budget`` seconds at a size; a call expected to take more than
    ``max_seconds`` is not made; one that takes more than ``single_seconds`` is made once, without warm-up."""

    repeats: int = 15
    budget: float = 15.0
    max_seconds: float = 60.0
    single_seconds: float = 20.0


@dataclass
class Row:
    """One kind at one shape.

    ``width``, ``height`` in px. ``ratio``: the best attention's median over this one's. Bytes: ``peak`` during a call
    above what was there before (input and weights not included), ``weights``, ``input``. ``error``: relative RMS
    against the definition at the sampled tokens, of gradients too where they were asked for. A kind that was skipped
    has no timing and a ``note``.
    """

    width: int
    height: int
    batch: int
    kind: str
    family: str
    backward: bool
    parameters: int | None = None
    timing: Timing | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    input_bytes: int | None = None
    error: float | None = None
    best: bool = False
    note: str = ""

    def record(self) -> dict[str, Any]:
        """A flat row for JSON and CSV."""
        values = asdict(self)
        timing = values.pop("timing") or dict.fromkeys(("median", "low", "high", "repeats"))
        return values | {
            "ms": timing["median"],
            "ms_low": timing["low"],
            "ms_high": timing["high"],
            "repeats": timing["repeats"],
        }


@dataclass
class _Candidate:
    kind: Kind
    row: Row
    call: Callable[[], Any]
    first_ms: float


def measure(
    shape: Shape,
    pixels: tuple[int, int],
    kinds: Sequence[str | Kind],
    limits: Limits,
    *,
    backward: bool = False,
    expected_seconds: Callable[[Kind], float] | None = None,
    on_kind: Callable[[str], None] = lambda kind: None,
    failures: list[str] | None = None,
) -> list[Row]:
    """Rows for ``kinds``, those in ``KINDS`` by name, at one shape; pixels: (height, width) of its picture.

    ``backward`` times forward and backward together, gradients of input and weights.
    ``expected_seconds`` says how long a call will take, unless given by a trial on a smaller grid. Raises
    SdHyenaError if a layer does not return what its definition says: no times are reported then; with a list of
    ``failures``, what is wrong with a kind goes there, and the others are measured.
    """
    rows: list[Row] = []
    candidates: list[_Candidate] = []
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.tokens, shape.dim, device=shape.device, dtype=shape.dtype)
    for kind in (KINDS[kind] if isinstance(kind, str) else kind for kind in kinds):
        row = Row(pixels[1], pixels[0], shape.batch, kind.name, kind.family, backward)
        rows.append(row)
        try:
            row.note = _reason_to_skip(kind, shape, limits, backward, expected_seconds)
            if row.note:
                continue
            on_kind(kind.name)
            candidates.append(_prepare(kind, row, shape, x, limits))
        except Exception as error:
            row.note = _reason_for(error, kind, fatal=failures is None)
            if failures is not None and not row.note.startswith("skipped"):
                failures.append(f"{kind.name} at {pixels[1]} px, batch {shape.batch}: {row.note}")
        gc.collect()
    warm = {c.kind.name: c.call for c in candidates if c.first_ms <= 1000 * limits.single_seconds}
    timings = interleaved(warm, shape.device, limits.repeats, limits.budget)
    for c in candidates:
        c.row.timing = timings.get(c.kind.name) or Timing.of([c.first_ms])
        if c.kind.name not in timings:
            c.row.note = "one call, without warm-up"
    _compare(rows)
    return rows


def _reason_for(error: Exception, kind: Kind, fatal: bool) -> str:
    """What a row says of a kind that failed. With ``fatal``, raises what is no other's fault than ours."""
    if is_out_of_memory(error):
        return "skipped: out of memory"
    if fatal and (kind.family == "hyena" or not isinstance(error, RuntimeError) or isinstance(error, SdHyenaError)):
        raise error
    return f"failed: {reason(error)}"


def check(kind: str, shape: Shape, *, backward: bool = False) -> float:
    """The relative RMS error of a kind against its definition, of the input's gradient too with ``backward``.

    Raises SdHyenaError if it is above the tolerance.
    """
    torch.manual_seed(0)
    row = Row(8 * shape.width, 8 * shape.height, shape.batch, kind, KINDS[kind].family, backward)
    x = torch.randn(shape.batch, shape.tokens, shape.dim, device=shape.device, dtype=shape.dtype)
    _prepare(KINDS[kind], row, shape, x, Limits())
    assert row.error is not None
    return row.error


def estimate_seconds(kind: Kind, shape: Shape, backward: bool) -> float:
    """How long a call will take, from one on a grid of a sixteenth of the cells; 0 for grids that small."""
    small = replace(shape, height=shape.height // 4, width=shape.width // 4)
    if small.tokens < 32 * 32:
        return 0.0
    layer = kind.build(small).to(shape.device, shape.dtype).requires_grad_(backward)
    x = torch.randn(shape.batch, small.tokens, shape.dim, device=shape.device, dtype=shape.dtype)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            y = layer(x, small.size)
            if backward:
                y.sum().backward()

    measure_one = stopwatch(shape.device)
    measure_one(call)
    return measure_one(call) / 1000 * (shape.tokens / small.tokens) ** kind.power


def _reason_to_skip(
    kind: Kind, shape: Shape, limits: Limits, backward: bool, expected_seconds: Callable[[Kind], float] | None
) -> str:
    missing = kind.refuses(shape) or kind.missing(shape, backward)
    if missing:
        return f"not available: {missing}"
    needed, free = kind.scratch(shape) * (2 if backward else 1), free_memory(shape.device)
    if needed > 0.8 * free:
        return f"skipped: needs about {needed / GIB:.1f} GiB beyond its input, {free / GIB:.1f} GiB are free"
    seconds = expected_seconds(kind) if expected_seconds else estimate_seconds(kind, shape, backward)
    if seconds > limits.max_seconds:
        return f"skipped: about {seconds:.0f} s a call, over the limit of {limits.max_seconds:g} s"
    return ""


def _prepare(kind: Kind, row: Row, shape: Shape, x: Tensor, limits: Limits) -> _Candidate:
    """Builds the layer, checks it, and fills in all of its row but the times."""
    layer: Any = kind.build(shape).to(shape.device, shape.dtype).eval().requires_grad_(row.backward)
    tokens = torch.randperm(shape.tokens, device=shape.device)[:SAMPLED]
    # Of the sampled tokens alone, because that gradient the definition can give.
    upstream = torch.zeros_like(x).index_copy_(1, tokens, torch.randn_like(x[:, tokens])) if row.backward else None
    exact, exact_gradient = _expected(layer, x, shape.size, tokens, upstream)
    results: dict[str, Tensor] = {}

    def call() -> None:
        if upstream is None:
            with torch.no_grad():
                results["y"] = layer(x, shape.size)
            return
        leaf = x.detach().requires_grad_()
        y = layer(leaf, shape.size)
        y.backward(upstream)
        layer.zero_grad(set_to_none=True)
        results["y"], results["gradient"] = y.detach(), leaf.grad

    def run_and_check() -> None:
        row.peak_bytes, _ = peak_of_call(call, shape.device)
        errors = [relative_error(results["y"][:, tokens], exact), row.error or 0.0]
        if exact_gradient is not None:
            errors.append(relative_error(results["gradient"], exact_gradient))
        results.clear()
        row.error = max(errors)
        if not row.error <= TOLERANCE[shape.dtype]:
            raise SdHyenaError(
                f"{kind.name} is off by {row.error:.1e} (relative RMS) from its definition on a {shape.height} x "
                f"{shape.width} grid: no times are reported"
            )

    def timed_call() -> None:
        call()
        results.clear()

    if shape.device.type == "cuda" and kind.family == "hyena":
        call()  # kernels are compiled and tuned in their first call, which says nothing of the next ones
    first_ms = stopwatch(shape.device)(run_and_check)
    if first_ms <= 1000 * limits.single_seconds:  # as it is from the second call on, with what was kept
        run_and_check()
    row.parameters = sum(p.numel() for p in layer.parameters())
    row.weight_bytes = sum(p.numel() * p.element_size() for p in layer.parameters())
    row.input_bytes = x.numel() * x.element_size()
    return _Candidate(kind, row, timed_call, first_ms)


def _expected(
    layer: Any, x: Tensor, size: tuple[int, int], tokens: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the definition returns at ``tokens``, and the input's gradient if there is one coming in."""
    with torch.set_grad_enabled(upstream is not None):
        leaf = x.detach().double().requires_grad_(upstream is not None)
        y = layer.expected(leaf, size, tokens)
    if upstream is None:
        return y, None
    return y.detach(), torch.autograd.grad((y * upstream[:, tokens].double()).sum(), leaf)[0]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative RMS difference; infinite if anything is not finite."""
    error = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    return error.item() if torch.isfinite(error) else float("inf")


def _compare(rows: Sequence[Row]) -> None:
    """Names the best attention and gives everyone's ratio to it."""
    attention = [row for row in rows if row.family == "attention" and row.timing]
    if not attention:
        return
    best = min(attention, key=lambda row: row.timing.median)  # type: ignore[union-attr]
    best.best = True
    for row in rows:
        if row.timing:
            row.ratio = best.timing.median / row.timing.median  # type: ignore[union-attr]


def measure_sizes(
    shape_at: Callable[[int], Shape],
    widths: Sequence[int],
    kinds: Sequence[str | Kind],
    limits: Limits,
    *,
    backward: bool = False,
    report: Callable[[list[Row]], None] = lambda rows: None,
    on_kind: Callable[[int, str], None] = lambda width, kind: None,
    failures: list[str] | None = None,
) -> list[Row]:
    """:func:`measure` for square pictures of growing widths in px; ``report`` gets each width's rows."""
    known: dict[str, tuple[int, float]] = {}  # kind -> tokens and seconds of the last size it ran at

    def expected_seconds(kind: Kind, tokens: int) -> float:
        before, seconds = known.get(kind.name, (tokens, 0.0))
        return seconds * (tokens / before) ** kind.power

    rows: list[Row] = []
    for width in sorted(widths):
        shape = shape_at(width)
        found = measure(
            shape,
            (width, width),
            kinds,
            limits,
            backward=backward,
            expected_seconds=partial(expected_seconds, tokens=shape.tokens),
            on_kind=partial(on_kind, width),
            failures=failures,
        )
        known |= {row.kind: (shape.tokens, row.timing.median / 1000) for row in found if row.timing}
        rows += found
        report(found)
    return rows


def crossover(rows: Sequence[Row], kind: str) -> int | None:
    """The smallest measured width from which ``kind`` stays faster than the best attention, or None."""
    ratios = [(row.width, row.ratio) for row in rows if row.kind == kind and row.ratio is not None]
    losing = [width for width, ratio in ratios if ratio < 1]
    return next((width for width, _ in ratios if not losing or width > max(losing)), None)
