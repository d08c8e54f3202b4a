"""What goes wrong within torch while a command computes: operations that run out of memory, or give NaN."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HEAVY = re.compile(r"aten\.(convolution|addmm|mm|bmm|baddbmm|.*scaled_dot_product.*attention.*)\.")
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "{} bytes. Error code 12 (Cannot allocate memory)"
)


class Meddler(TorchDispatchMode):
    """Counts the heavy operations; calls ``at`` with the number of each, from 1, and its output.

    Attention to what is not finite is not finite, as on a GPU: torch's kernel for the CPU (2.13) makes zeros of it
    where there are fewer than 8 keys, and nobody could tell.
    """

    def __init__(self, at: Callable[[int, Any], Any]) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        computed = isinstance(first, torch.Tensor) and not first.is_meta and first.is_floating_point()
        if computed and HEAVY.match(str(func)):
            self.count += 1
            self.at(self.count, first)
            if "attention" in str(func) and not all(bool(each.isfinite().all()) for each in args[:3]):
                first.fill_(float("nan"))
        return result


def out_of_memory(number: int, times: int, cuda: bool) -> Callable[[int, Any], None]:
    """Operation ``number`` and ``times`` - 1 after it find no memory."""

    def at(count: int, output: torch.Tensor) -> None:
        if number <= count < number + times:
            if cuda:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB")
            raise RuntimeError(ALLOCATOR.format(output.nbytes))

    return at


def larger_than(limit: int) -> Callable[[int, Any], None]:
    """No operation has an output of more than ``limit`` bytes, however often it is tried."""

    def at(count: int, output: torch.Tensor) -> None:
        if output.nbytes > limit:
            raise RuntimeError(ALLOCATOR.format(output.nbytes))

    return at


def not_a_number(number: int, value: float) -> Callable[[int, Any], None]:
    """Operation ``number`` gives ``value`` throughout."""

    def at(count: int, output: torch.Tensor) -> None:
        if count == number:
            with torch.no_grad():
                output.fill_(value)

    return at


def largest(sizes: list[int]) -> Callable[[int, Any], None]:
    """Notes the bytes of every output."""
    return lambda count, output: sizes.append(output.nbytes)
