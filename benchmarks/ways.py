"""One layer in the ways it can be run: by a path of one's choice, compiled, and from a CUDA graph. Kinds of their own,
to be measured beside those they are made of."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.benchmark.kinds import KINDS, Kind, Shape
from sd_hyena.ops import environment


class Wrapped(nn.Module):
    """A layer run in another way, which computes the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def expected(self, *args: Any) -> Tensor:
        return self.layer.expected(*args)


class ByPath(Wrapped):
    """Run with ``SD_HYENA_KERNEL`` set."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        super().__init__(layer)
        self.path = path

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        before = os.environ.get(environment.KERNEL)
        os.environ[environment.KERNEL] = self.path
        try:
            return self.layer(x, size)
        finally:
            if before is None:
                del os.environ[environment.KERNEL]
            else:
                os.environ[environment.KERNEL] = before


class Compiled(Wrapped):
    """Run by ``torch.compile``, for one shape at a time, with nothing left to Python."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        # Each layer and shape is compiled once more; beyond this many PyTorch would refuse.
        torch._dynamo.config.cache_size_limit = 1000
        self.run = torch.compile(layer, fullgraph=True, dynamic=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.run(x, size)


class Graphed(Wrapped):
    """Captured in a CUDA graph at the first call, replayed from then on; for inputs of one shape.

    What the graph's own memory holds is held between calls, so that no measured peak shows it.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not hasattr(self, "graph"):
            self._capture(x, size)
        self.x.copy_(x)
        self.graph.replay()
        return self.y

    def _capture(self, x: Tensor, size: tuple[int, int]) -> None:
        self.x = x.clone()
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            for _ in range(3):  # kernels are compiled and checked here: neither can be done while a graph is recorded
                self.layer(self.x, size)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        torch.cuda.synchronize(x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.y = self.layer(self.x, size)
        self.graph = graph


def by_path(kind: str, path: str) -> Kind:
    """A Hyena kind by one of ``ops.mix.PATHS``."""
    return _way(kind, path, lambda layer: ByPath(layer, path))


def compiled(kind: str) -> Kind:
    """Any kind under ``torch.compile``."""
    return _way(kind, "compiled", Compiled)


def graphed(kind: str) -> Kind:
    """Any kind, replayed from a CUDA graph."""
    return replace(_way(kind, "graph", Graphed), refuses=_no_gpu)


def _way(kind: str, name: str, wrap: Any) -> Kind:
    base = KINDS[kind]
    return replace(base, name=f"{kind}, {name}", build=lambda shape: wrap(base.build(shape)))


def _no_gpu(shape: Shape) -> str:
    return "" if shape.device.type == "cuda" else "CUDA graphs need a GPU"
