"""One Hyena layer in the ways it can be run: by each backend, in less memory, in a CUDA graph, and as one would
write it first, by torch.fft alone. Kinds like those in :mod:`.kinds`, to be measured beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dispatch, environment
from ..ops.fft import fast_length
from .kinds import KINDS, Hyena, Kind, Shape


class Wrapped(nn.Module):
    """A layer run in another way, which computes the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def kept_bytes(self) -> int:
        """What is kept between calls, beside the weights."""
        return self.layer.kept_bytes() if hasattr(self.layer, "kept_bytes") else 0

    def expected(self, *args: Any) -> Tensor:
        return self.layer.expected(*args)


class Under(Wrapped):
    """Run with environment variables set."""

    def __init__(self, layer: nn.Module, variables: Mapping[str, str]) -> None:
        super().__init__(layer)
        self.variables = dict(variables)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        with environment.variables_set(self.variables):
            return self.layer(x, size)


class Graphed(Wrapped):
    """Captured in a CUDA graph at the first call, replayed from then on; for inputs of one shape."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not hasattr(self, "graph"):
            self._capture(x, size)
        self.x.copy_(x)
        self.graph.replay()
        return self.y

    def kept_bytes(self) -> int:
        """With what the graph's memory holds while it runs, which no later allocation shows."""
        return super().kept_bytes() + self.pool_bytes

    def _capture(self, x: Tensor, size: tuple[int, int]) -> None:
        self.x = x.clone()
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            for _ in range(3):  # tunes, and keeps what is kept between calls
                self.layer(self.x, size)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        torch.cuda.synchronize(x.device)
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.y = self.layer(self.x, size)
        self.graph, self.pool_bytes = graph, torch.cuda.max_memory_allocated(x.device) - before


class PlainFFT(Wrapped):
    """The operator with its convolution by ``rfft2`` and ``irfft2`` of all planes at once, in float32, with a
    spectrum kept between calls, and everything else by PyTorch's own functions."""

    layer: Hyena

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        operator = self.layer.operator
        parts = operator.short_filter(operator.in_proj(x).transpose(1, 2).unflatten(2, size)).chunk(3, dim=1)
        mixed = operator.gate_and_convolve(parts, slice(0, operator.inner_dim), self._convolve)
        return operator.out_proj(mixed.flatten(2).transpose(1, 2))

    def kept_bytes(self) -> int:
        return self.spectrum.nbytes if hasattr(self, "spectrum") else 0

    def _convolve(self, v: Tensor, index: int, channels: slice) -> Tensor:
        h, w = v.shape[2:]
        ry, rx = self.layer.operator.filter.radius((h, w))
        shape = [fast_length(h + ry), fast_length(w + rx)]
        spectrum = getattr(self, "spectrum", None)
        if spectrum is None or spectrum.shape[1] != shape[0]:
            spectrum = self.spectrum = self._transformed((h, w), shape, (ry, rx))
        y = torch.fft.irfft2(torch.fft.rfft2(v.float(), s=shape) * spectrum, s=shape)
        return y[..., ry : ry + h, rx : rx + w].to(v.dtype)

    def _transformed(self, size: tuple[int, int], shape: list[int], radius: tuple[int, int]) -> Tensor:
        everything = slice(0, self.layer.operator.inner_dim)
        k = self.layer.operator.kernels(size, 0, everything, self.layer.operator.filter.hidden(size)).float()
        bias, gain = (t.float() for t in self.layer.operator.shortcuts(0, everything))
        k[:, radius[0], radius[1]] += bias
        spectrum = torch.fft.rfft2(k, s=shape)
        spectrum[:, 0, 0] += gain * (shape[0] * shape[1] / (size[0] * size[1]))  # the mean over the grid
        return spectrum


def by_backend(kind: str, backend: dispatch.Backend) -> Kind:
    """A Hyena kind with its convolutions by one backend, wherever that can take them."""
    base = KINDS[kind]

    def refuses(shape: Shape) -> str:
        with torch.device("meta"):
            operator: Any = base.build(shape).operator
        radius = operator.filter.radius(shape.size)
        return backend.refuses(
            dispatch.Case(shape.device, shape.dtype, shape.size, radius, operator.global_branch == "mean")
        )

    how = {environment.KERNEL: backend.name}
    return replace(
        base, name=f"{kind}, {backend.name}", build=lambda shape: Under(base.build(shape), how), refuses=refuses
    )


def low_memory(kind: str) -> Kind:
    """A Hyena kind with ``SD_HYENA_LOW_MEMORY=1``."""
    base, how = KINDS[kind], {environment.LOW_MEMORY: "1"}
    return replace(
        base,
        name=f"{kind}, low memory",
        build=lambda shape: Under(base.build(shape), how),
        refuses=lambda shape: "" if shape.device.type == "cuda" else "on a CPU memory is low as it is",
    )


def graphed(kind: str) -> Kind:
    """Any kind, replayed from a CUDA graph."""
    base = KINDS[kind]
    return replace(
        base,
        name=f"{kind}, graph",
        build=lambda shape: Graphed(base.build(shape)),
        refuses=lambda shape: "" if shape.device.type == "cuda" else "CUDA graphs need a GPU",
    )


def plain_fft(kind: str) -> Kind:
    """A Hyena kind by torch.fft alone, the ``full`` form."""
    base = KINDS[kind]
    return replace(base, name=f"{kind}, plain torch.fft", build=lambda shape: PlainFFT(base.build(shape)))
