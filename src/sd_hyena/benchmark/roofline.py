"""The parts of a Hyena layer against what the machine can do at most: bytes moved and products made in a second.

Both ceilings are measured in the same run, by a large copy and a large matrix product. A part's bytes count every
input read once and every output written once; its operations are those of the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn import Hyena2D
from ..ops import dispatch, gemm_conv, long_conv
from .flops import fft_convolution_flops, gemm_convolution_flops
from .timing import Timing, interleaved

CACHE = 2**28  # bytes: inputs rotate over more than any cache holds
MOST_SETS = 24


@dataclass(frozen=True)
class Ceilings:
    """Bytes read and written, and operations of a matrix product, in a second."""

    copy: float
    product: float


@dataclass
class Part:
    """One part at one size. ``bytes_`` and ``flops`` of one call; ``call``, one of several with inputs of their own."""

    name: str
    bytes_: int
    flops: int
    calls: list[Callable[[], object]]
    timing: Timing | None = None


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Measured now: the medians of a copy (8 GiB on a GPU) and of a product of square matrices (8192 a side)."""
    large = device.type == "cuda" and not quick
    count, side = (2**32, 8192) if large else (2**24, 512)
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    for call in calls.values():
        call()
    timings = interleaved(calls, device, 20, 3)
    return Ceilings(
        2 * source.nbytes / (timings["copy"].median / 1000), 2 * side**3 / (timings["product"].median / 1000)
    )


def parts(
    grid: tuple[int, int], batch: int, dtype: torch.dtype, device: torch.device, dim: int = 320
) -> Iterator[Part]:
    """What a layer of ``dim`` channels, global branch ``linear``, is made of, and the convolution by every backend
    that takes the case."""
    operator = Hyena2D(dim, extent=(64, 64), attention_heads=8).to(device, dtype).eval()
    cells = grid[0] * grid[1]
    unit = batch * dim * cells
    size = torch.empty((), dtype=dtype).element_size()
    sets = min(MOST_SETS, -(-CACHE // (3 * unit * size)) + 1) if device.type == "cuda" else 2

    def several(make: Callable[[], Callable[[], object]]) -> list[Callable[[], object]]:
        return [make() for _ in range(sets)]

    def signal(channels: int = dim, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(batch, channels, *grid, device=device, dtype=kind)

    def project_in() -> Callable[[], object]:
        tokens = torch.randn(batch, cells, dim, device=device, dtype=dtype).transpose(1, 2)
        weight = operator.in_proj.weight.expand(batch, -1, -1)
        return lambda: torch.bmm(weight, tokens)

    def project_out() -> Callable[[], object]:
        y, weight = signal().flatten(2).transpose(1, 2), operator.out_proj.weight.T.expand(batch, -1, -1)
        return lambda: torch.bmm(y, weight)

    yield Part("projection in", 4 * unit * size, 6 * unit * dim, several(project_in))
    yield Part("projection out", 2 * unit * size, 2 * unit * dim, several(project_out))
    kernels = dispatch.kernels()
    if kernels is not None and not kernels.launch.refuses(device):
        yield from _kernel_parts(operator, unit, size, signal, several)
    yield from _convolutions(operator, grid, batch, dtype, device, signal, several)


def _kernel_parts(operator: Any, unit: int, size: int, signal: Callable, several: Callable) -> Iterator[Part]:
    kernels, heads = dispatch.kernels(), operator.attention_heads
    short, scale = operator.short_filter, operator.gate.weight[:, 0, :, 0, 0]
    half = torch.float32 if operator.in_proj.weight.dtype == torch.float32 else torch.float16

    def short_gate() -> Callable[[], object]:
        p, grid = signal(3 * operator.dim).flatten(2), signal(1).shape[-2:]
        given = (None, short.weight[:, 0], short.bias, scale[1], tuple(grid), half, True)
        return lambda: kernels.short_gate.short_gate(p, *given)

    def attend() -> Callable[[], object]:
        q, k, u, y = signal(), signal(), signal(kind=half), signal(kind=half)
        maps = [(m.weight, m.bias) for m in (operator.features.query, operator.features.key)]
        gain = operator.gain.weight[0, 0, :, 0, 0]
        return lambda: kernels.features.attend_and_gate(q, k, u, y, *maps, gain, scale[0])

    features = operator.features.query.weight.shape[1]  # of one head
    yield Part("short filter and gate", 6 * unit * size, 3 * unit * 18, several(short_gate))
    yield Part(f"attend and gate ({heads} heads)", 5 * unit * size, 8 * unit * features, several(attend))


def _convolutions(
    operator: Any,
    grid: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    signal: Any,
    several: Any,
) -> Iterator[Part]:
    radius, dim = operator.filter.radius(grid), operator.dim
    for backend in dispatch.BACKENDS:
        if backend.refuses(dispatch.Case(device, dtype, grid, radius)):
            continue
        with torch.no_grad():
            spectrum = operator.spectrum(grid, 0, slice(0, dim), operator.keep_all(), {}, backend)
        count = gemm_convolution_flops if backend.spectral is gemm_conv else fft_convolution_flops
        kind = dtype if backend.spectral is long_conv else torch.float16

        def convolve(backend: Any = backend, spectrum: Tensor = spectrum, kind: Any = kind) -> Callable[[], object]:
            u = signal(kind=kind)
            return lambda: backend.convolve(u, spectrum, radius)

        moved = 2 * batch * dim * grid[0] * grid[1] * torch.empty((), dtype=kind).element_size() + spectrum.nbytes
        yield Part(f"convolution, {backend.name}", moved, batch * dim * count(grid, radius), several(convolve))


@torch.no_grad()
def time_parts(found: Sequence[Part], device: torch.device, repeats: int = 20, budget: float = 4) -> None:
    """Fills in the timings, of one call: on a GPU all of a part's calls replay from one CUDA graph, so that what
    is timed is the GPU's work and not Python's."""
    calls = {part.name: _together(part.calls, device) for part in found}
    timings = interleaved(calls, device, repeats, budget)
    for part in found:
        t, n = timings[part.name], len(part.calls)
        part.timing = Timing(t.median / n, t.low / n, t.high / n, t.repeats)


def _together(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    run()  # tunes, and makes plans
    if device.type != "cuda":
        return run
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


HEADINGS = ["part", "ms", "GB/s", "of the copy's", "TFLOP/s", "of the product's", "times its floor"]


def lines(found: Sequence[Part], most: Ceilings) -> list[list[str]]:
    """One line a part. Its floor is the time that its bytes or its products take at the ceilings, the longer one."""
    made = []
    for part in found:
        assert part.timing is not None
        seconds = part.timing.median / 1000
        rate, speed = part.bytes_ / seconds, part.flops / seconds
        floor = max(part.bytes_ / most.copy, part.flops / most.product)
        made.append(
            [
                part.name,
                f"{part.timing.median:.3g}",
                f"{rate / 1e9:.0f}",
                f"{rate / most.copy:.0%}",
                f"{speed / 1e12:.3g}",
                f"{speed / most.product:.0%}",
                f"{seconds / floor:.1f}",
            ]
        )
    return made
