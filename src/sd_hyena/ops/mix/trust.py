"""No kernel is believed before it agreed with the plain path on this device, and none that fails is tried again."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...errors import is_out_of_memory
from ...texts import reason
from .call import Call

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # relative RMS
MOST_BLOCKS = 3  # of a side of the grid that is tried
logger = logging.getLogger(__name__)
_verdicts: dict[Hashable, bool] = {}


def run(path: Any, plain: Any, call: Call) -> Tensor:
    """``path.run(call)``, or ``plain.run(call)``, with one warning, if the path is wrong or fails.

    The first call of each shape class (device, type, heads, blocks) runs both on random data, which takes
    milliseconds beside compilation. Running out of memory is not a path's fault, and is raised.
    """
    key = path.NAME, _shape_class(call)
    if key not in _verdicts:
        if call.v.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return plain.run(call)  # nothing can be compared while a graph is recorded
        _verdicts[key] = _agrees(path, plain, call)
    if not _verdicts[key]:
        return plain.run(call)
    try:
        return path.run(call)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _verdicts[key] = False
        _warn(path, f"fail ({type(error).__name__}: {reason(error)})")
        return plain.run(call)


def _shape_class(call: Call) -> Hashable:
    v = call.v
    return v.device, v.dtype, v.shape[2:], call.feature_map, call.block, call.weights is None, call.near is None


def _agrees(path: Any, plain: Any, call: Call) -> bool:
    """Whether the path computes what ``plain`` does on a few blocks of random data, some of them cut by the edge."""
    try:
        trial = _trial(call)
        got, expected = path.run(trial).float(), plain.run(trial).float()
        off = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
    except Exception as error:  # whatever a compiler or driver raises
        if is_out_of_memory(error):
            raise
        _warn(path, f"fail ({type(error).__name__}: {reason(error)})")
        return False
    if not off <= TOLERANCE[call.v.dtype]:
        _warn(path, f"are off by {off:.1e} (relative RMS) from the plain path")
        return False
    return True


def _trial(call: Call) -> Call:
    """The call's shape class on a small grid; without blocks at most 48 x 48 cells."""
    v, (h, w) = call.v, call.size
    size = min(h, 48), min(w, 48)
    if call.block:
        size = min(h, MOST_BLOCKS * call.block[0]), min(w, MOST_BLOCKS * call.block[1])
        size = max(1, size[0] - (size[0] > call.block[0])), max(1, size[1] - (size[1] > call.block[1]))
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 1, size[0] * size[1], *v.shape[2:], generator=generator).to(v.device, v.dtype)
    weights = call.weights
    if weights is not None and call.block:
        count = -(-size[0] // call.block[0]) * -(-size[1] // call.block[1])
        weights = (torch.rand(len(weights), count, count, generator=generator) + 0.5).to(v.device, weights.dtype)
    return call._replace(q=data[0], k=data[1], v=data[2], size=size, weights=weights)


def _warn(path: Any, why: str) -> None:
    logger.warning("Hyena layers run without the %s kernels from here on, which %s", path.NAME, why)
