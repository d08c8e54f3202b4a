"""The two Triton kernels of :mod:`.gpu`: states are made from k and v, and read by q, where these lie in memory.

Products are taken in TF32 where the input is of half precision: as fine as float16 and with float32's range, so that
no feature and no sum over a block overflows. Heads wider than ``CHUNK`` channels are worked on in pieces.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..naive import POWERS

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
CHUNK, TOKENS = 64, 64
CODES = {"exp": 0, "elu": 1, **POWERS}


@lru_cache(maxsize=64)
def refuses(device: torch.device) -> str:
    """Why kernels cannot be run on tensors there, or ""."""
    if INTERPRETED:
        return "" if device.type == "cpu" else "Triton interprets, which it does on a CPU"
    if device.type != "cuda":
        return "Triton is not interpreting"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability {major}.{minor}: the kernels are made for 8.0 and newer"


def on(device: torch.device) -> AbstractContextManager:
    """Where kernels are to be launched, which Triton takes from PyTorch's current device, not from tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _features(z, MAP: tl.constexpr):
    if MAP == 0:
        z = tl.exp(tl.minimum(tl.maximum(z, -30), 30))
    elif MAP == 1:
        z = tl.where(z > 0, z + 1, tl.exp(tl.minimum(z, 0)))
    else:
        z = tl.maximum(z, 0)
        z = (z * z * z if MAP == 3 else z * z) + 1e-4
    return z


@triton.jit
def _cells(block, tile, h, w, rows, columns, across, TOKENS: tl.constexpr):
    """A tile of a block's cells: their place in the grid, and whether there is one."""
    i = tile * TOKENS + tl.arange(0, TOKENS)
    y = (block // across) * rows + i // columns
    x = (block % across) * columns + i % columns
    return y * w + x, (i < rows * columns) & (y < h) & (x < w)


@triton.jit
def _make(
    k_ptr, v_ptr, state_ptr, h, w, rows, columns, across, heads, width, chunks,
    MAP: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNK features by CHUNK values of one block's state, and with the first values the features' sums."""
    block = tl.program_id(0)
    feature = (tl.program_id(1) // chunks) * CHUNK + tl.arange(0, CHUNK)
    value = (tl.program_id(1) % chunks) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(2) % heads
    image = (tl.program_id(2) // heads).to(tl.int64)
    state = tl.zeros((CHUNK, CHUNK), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for tile in range(tl.cdiv(rows * columns, TOKENS)):
        cell, inside = _cells(block, tile, h, w, rows, columns, across, TOKENS)
        token = (image * h * w + cell)[:, None] * (heads * width) + head * width
        some = inside[:, None] & (feature < width)[None, :]
        k = tl.load(k_ptr + token + feature[None, :], mask=some, other=0).to(tl.float32)
        k = tl.where(some, _features(k, MAP), 0.0)
        some = inside[:, None] & (value < width)[None, :]
        v = tl.load(v_ptr + token + value[None, :], mask=some, other=0).to(tl.float32)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
        total += tl.sum(k, 0)
    row = ((image * heads + head) * tl.num_programs(0) + block) * width * (width + 1) + feature * (width + 1)
    some = (feature < width)[:, None] & (value < width)[None, :]
    tl.store(state_ptr + row[:, None] + value[None, :], state, mask=some)
    if tl.program_id(1) % chunks == 0:
        tl.store(state_ptr + row + width, total, mask=feature < width)


@triton.jit
def _read(
    q_ptr, state_ptr, near_ptr, out_ptr, h, w, rows, columns, across, blocks, heads, width, chunks,
    SHARED: tl.constexpr, NEAR: tl.constexpr,
    MAP: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNK values of a tile of one block's tokens. SHARED: there is one state for all blocks."""
    tiles = tl.cdiv(rows * columns, TOKENS)
    block = tl.program_id(0) // tiles
    value = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(2) % heads
    image = (tl.program_id(2) // heads).to(tl.int64)
    cell, inside = _cells(block, tl.program_id(0) % tiles, h, w, rows, columns, across, TOKENS)
    token = (image * h * w + cell)[:, None] * (heads * width) + head * width
    own = image * heads + head
    if not SHARED:
        own = own * blocks + block
    y = tl.zeros((TOKENS, CHUNK), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for chunk in range(chunks):
        feature = chunk * CHUNK + tl.arange(0, CHUNK)
        some = inside[:, None] & (feature < width)[None, :]
        q = tl.load(q_ptr + token + feature[None, :], mask=some, other=0).to(tl.float32)
        q = tl.where(some, _features(q, MAP), 0.0)
        row = state_ptr + own * width * (width + 1) + feature * (width + 1)
        some = (feature < width)[:, None] & (value < width)[None, :]
        state = tl.load(row[:, None] + value[None, :], mask=some, other=0)
        y = tl.dot(q, state, y, input_precision=PRECISION)
        total += tl.sum(q * tl.load(row + width, mask=feature < width, other=0)[None, :], 1)
    some = inside[:, None] & (value < width)[None, :]
    y = y / tl.where(inside, total, 1.0)[:, None]
    where = token + value[None, :]
    if NEAR:
        y += tl.load(near_ptr + where, mask=some, other=0).to(tl.float32)
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=some)


def make_states(k: Tensor, v: Tensor, size: tuple[int, int], block: tuple[int, int], feature_map: str) -> Tensor:
    """k, v: (B, L, H, d), contiguous. Returns sums of features times values, and of features: (B, H, blocks, d,
    d + 1), float32."""
    b, _, heads, width = v.shape
    across, count, chunks, how = _plan(v, size, block, feature_map)
    states = torch.empty(b, heads, count, width, width + 1, device=v.device)
    _make[(count, chunks * chunks, b * heads)](k, v, states, *size, *block, across, heads, width, chunks, **how)
    return states


def read_states(
    q: Tensor, size: tuple[int, int], block: tuple[int, int], feature_map: str, states: Tensor, near: Tensor | None
) -> Tensor:
    """What q, (B, L, H, d), reads from ``states``, (B, H, blocks or 1, d, d + 1), plus ``near``: (B, L, H d) each."""
    b, cells, heads, width = q.shape
    across, count, chunks, how = _plan(q, size, block, feature_map)
    out = torch.empty(b, cells, heads * width, device=q.device, dtype=q.dtype)
    tiles = triton.cdiv(block[0] * block[1], TOKENS)
    _read[(count * tiles, chunks, b * heads)](
        q, states, out if near is None else near, out, *size, *block, across, count, heads, width, chunks,
        SHARED=states.shape[2] == 1, NEAR=near is not None, **how,
    )  # fmt: skip
    return out


def _plan(
    like: Tensor, size: tuple[int, int], block: tuple[int, int], feature_map: str
) -> tuple[int, int, int, dict[str, Any]]:
    """Blocks along a row, in all, pieces of a head, and what the kernels are compiled for."""
    across, width = triton.cdiv(size[1], block[1]), like.shape[-1]
    chunk = min(CHUNK, max(16, triton.next_power_of_2(width)))
    how = {
        "MAP": CODES[feature_map],
        "CHUNK": chunk,
        "TOKENS": TOKENS,
        "PRECISION": "ieee" if like.dtype == torch.float32 else "tf32",
    }
    return across, across * triton.cdiv(size[0], block[0]), triton.cdiv(width, chunk), how
