"""Inference on a CPU: few large steps, each over a band of rows that fits in cache, written where it is needed.

Tokens stay channels-last. Per band: q or k go through the first half of their feature map on the way into block
order, the rest of it is done in place, one batched product makes or reads all states of all heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import blocks_along
from ..naive import FLOOR, POWERS
from .call import Call, planes

NAME, CHECKED = "cpu", False
BAND = 2**18  # elements of q worked on at once


def refuses(call: Call) -> str:
    if call.v.device.type != "cpu":
        return f"on {call.v.device.type}"
    if call.v.dtype != torch.float32:
        return f"{str(call.v.dtype).removeprefix('torch.')} is not what processors multiply fastest"
    return "a gradient is wanted" if call.wants_gradient else ""


def run(call: Call) -> Tensor:
    images, _, heads, width = call.v.shape
    (h, w), dtype = call.size, call.v.dtype
    rows, columns = call.block or (max(1, min(h, BAND // (w * heads * width))), w)
    across, down = -(-w // columns), -(-h // rows)
    step = max(1, BAND // (rows * w * heads * width))  # rows of blocks to a band
    bands = [range(top, min(top + step, down)) for top in range(0, down, step)]
    y = torch.empty(images, h, w, heads * width, dtype=dtype)
    parts = (t.unflatten(1, call.size) for t in (call.q, call.k, call.v))
    for q, k, v, result in zip(*parts, y, strict=True):  # h w H d
        states = torch.empty(heads, down * across, width, width + 1, dtype=dtype)
        for band in bands:
            lines, some = _lines(band, rows, h), slice(band.start * across, band.stop * across)
            keys = _features(k[lines], (rows, columns), call.feature_map)
            values = _values(v[lines], (rows, columns))
            states[:, some] = torch.bmm(keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)).unflatten(
                0, (heads, -1)
            )
            del keys, values
        if call.weights is not None:
            states = torch.bmm(call.weights, states.flatten(2)).view_as(states)
        else:
            states = states.sum(1, keepdim=True)
        for band in bands:
            lines, some = _lines(band, rows, h), slice(band.start * across, band.stop * across)
            queries = _features(q[lines], (rows, columns), call.feature_map)
            own = states[:, some] if call.weights is not None else states.expand(-1, len(band) * across, -1, -1)
            part = torch.bmm(queries.flatten(0, 1), own.reshape(-1, width, width + 1)).unflatten(0, (heads, -1))
            del queries
            part = part.unflatten(2, (rows, columns)).unflatten(1, (len(band), across))  # H down across rows columns d
            near = None if call.near is None else _near(call, v, lines)
            _divide(part, result[lines].unflatten(2, (heads, width)), near)
    return y.flatten(1, 2)


def _lines(band: range, rows: int, h: int) -> slice:
    return slice(band.start * rows, min(band.stop * rows, h))


def _view(x: Tensor, block: tuple[int, int]) -> Tensor:
    """(h, w, H, d) as a view (H, blocks down, blocks across, rows, columns, d), of a padded copy where needed."""
    (h, w), (down, across) = x.shape[:2], blocks_along(x.shape[:2], block)
    if (down * block[0], across * block[1]) != (h, w):
        x = F.pad(x, (0, 0, 0, 0, 0, across * block[1] - w, 0, down * block[0] - h))
    x = x.unflatten(1, (across, block[1])).unflatten(0, (down, block[0]))
    return x.permute(4, 0, 2, 1, 3, 5)


def _features(z: Tensor, block: tuple[int, int], feature_map: str) -> Tensor:
    """:func:`sd_hyena.ops.naive.features` of (h, w, H, d), in block order: (H, blocks, cells, d)."""
    view = _view(z, block)
    made = view.new_empty(view.shape)
    if feature_map in POWERS:
        torch.clamp_min(view, 0, out=made).pow_(POWERS[feature_map]).add_(FLOOR)
    elif feature_map == "exp":
        torch.clamp(view, -30, 30, out=made).exp_()
    else:
        F.elu_(made.copy_(view)).add_(1)
    return made.flatten(3, 4).flatten(1, 2)


def _values(v: Tensor, block: tuple[int, int]) -> Tensor:
    """Values in block order, with a one appended, or beyond the grid a zero: (H, blocks, cells, d + 1)."""
    view = _view(v, block)
    made = view.new_empty(*view.shape[:-1], view.shape[-1] + 1)
    made[..., :-1] = view
    made[..., -1] = 1
    beyond = view.shape[1] * block[0] - v.shape[0], view.shape[2] * block[1] - v.shape[1]
    if beyond[0]:
        made[:, -1, :, -beyond[0] :, :, -1] = 0
    if beyond[1]:
        made[:, :, -1, :, -beyond[1] :, -1] = 0
    return made.flatten(3, 4).flatten(1, 2)


def _divide(part: Tensor, out: Tensor, near: Tensor | None) -> None:
    """Numerators over their denominators, (H, down, across, rows, columns, d + 1), and ``near``, into ``out``; both
    (h, w, H, d)."""
    (h, w), (down, across, rows, columns) = out.shape[:2], part.shape[1:5]
    above, below = part[..., :-1], part[..., -1:].expand_as(part[..., :-1])
    if (down * rows, across * columns) == (h, w):
        target = _view(out, (rows, columns))
        if near is None:
            torch.div(above, below, out=target)
        else:
            torch.addcdiv(_view(near, (rows, columns)), above, below, out=target)
        return
    quotient = (above / below).permute(1, 3, 2, 4, 0, 5).flatten(2, 3).flatten(0, 1)[:h, :w]
    out.copy_(quotient if near is None else quotient + near)


def _near(call: Call, v: Tensor, lines: slice) -> Tensor:
    """The near filter's result in some rows, (h, w, H, d)."""
    assert call.near is not None
    top, bottom = max(0, lines.start - call.reach), min(len(v), lines.stop + call.reach)
    filtered = call.near(planes(v[None, top:bottom], (bottom - top, v.shape[1])))[0].permute(1, 2, 0)
    filtered = filtered[lines.start - top : lines.stop - top]
    return filtered.unflatten(2, v.shape[2:])
