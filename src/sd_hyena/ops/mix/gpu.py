"""Inference on a GPU by two Triton kernels, :mod:`.kernels`; what they compute is held to ``plain`` first."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ...texts import reason
from .. import environment
from .call import Call, planes

NAME, CHECKED = "triton", True
TYPES = (torch.float16, torch.bfloat16, torch.float32)
LINES = 2**12  # cells of the bands that are summed side by side where there are no blocks


@lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """The kernels, or why they cannot be had."""
    try:
        from . import kernels
    except (ImportError, AttributeError) as error:  # the latter of a Triton older than what they are written for
        return f"Triton cannot be used: {reason(error)}"
    return kernels


def refuses(call: Call) -> str:
    device = call.v.device
    if device.type == "cpu" and environment.kernel() != NAME:
        return "for tests only on a CPU, where Triton interprets"
    if device.type not in ("cpu", "cuda"):
        return f"Triton does not run on {device.type}"
    if call.wants_gradient:
        return "a gradient is wanted"
    if call.v.dtype not in TYPES:
        return f"not for {str(call.v.dtype).removeprefix('torch.')}"
    kernels = _load()
    return kernels if isinstance(kernels, str) else kernels.refuses(device)


def run(call: Call) -> Tensor:
    kernels = _load()
    assert isinstance(kernels, ModuleType)
    q, k, v = (t.contiguous() for t in (call.q, call.k, call.v))
    h, w = call.size
    near = None
    if call.near is not None:
        near = call.near(planes(v, call.size)).flatten(2).transpose(1, 2).contiguous()
    with kernels.on(v.device):
        block = call.block or (max(1, min(h, LINES // w)), w)
        states = kernels.make_states(k, v, call.size, block, call.feature_map)
        if call.weights is None:
            states = states.sum(2, keepdim=True)
        else:
            states = (call.weights.float() @ states.flatten(3)).view_as(states)
        return kernels.read_states(q, call.size, block, call.feature_map, states.contiguous(), near)
