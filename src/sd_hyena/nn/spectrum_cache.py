"""Keeps kernel spectra between calls at inference, where they do not depend on the input."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn

LIMIT = 2**30  # bytes that all layers of a process keep together on a CPU
SHARE = 0.25  # of an accelerator's memory that they keep together


class SpectrumCache:
    """A layer's spectra for one grid, as many channels of them as it may keep, and what they are made from.

    All is dropped as soon as the grid changes or a parameter is replaced, moved or changed in place. What is
    written through ``parameter.data`` leaves no trace that could be seen: call :meth:`clear` after it, or
    ``train`` or ``eval`` on the layer, which do. Nothing is kept beyond ``LIMIT``, or a share
    of an accelerator's memory, over all layers. The cache
    lives outside the module's buffers, so it never reaches a saved file.
    """

    def __init__(self) -> None:
        with _lock:
            _caches.add(self)
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._state: Hashable = None
        self._hidden: Tensor | None = None
        self._spectra: dict[int, Tensor] = {}  # by convolution: room for the channels from 0 on
        self._made: dict[int, int] = {}  # how many of those channels have been made

    def check(self, grid: tuple[int, int], choices: Hashable, parameters: Iterable[nn.Parameter]) -> None:
        """Forgets everything unless grid, choices and parameter values are those of the last call."""
        values = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in parameters)
        state = grid, choices, values
        if state != self._state:
            self.clear()
            self._state = state

    def hidden(self, keep: bool, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, kept if asked and if there is room."""
        if self._hidden is not None:
            return self._hidden
        hidden = compute()
        if keep and _size(hidden) <= _room(hidden.device):
            self._hidden = hidden
        return hidden

    def spectrum(
        self,
        index: int,
        channels: slice,
        shape: tuple[int, ...],
        wanted: int,
        like: Tensor,
        make: Callable[[Tensor | None], Tensor],
    ) -> Tensor:
        """The spectrum (C, *shape) of convolution ``index`` for some channels.

        wanted: channels, from the first on, to keep; like: a tensor of the spectra's device and type;
        ``make(out)`` makes it, into ``out`` if that is given.
        """
        if channels.stop <= self._made.get(index, 0):
            return self._spectra[index][channels]
        kept = self._grow(index, shape, wanted, like)
        made = self._made.get(index, 0)
        if channels.stop > kept or channels.start > made:
            return make(None)
        spectrum = make(self._spectra[index][channels])
        self._made[index] = channels.stop
        return spectrum

    def _grow(self, index: int, shape: tuple[int, ...], wanted: int, like: Tensor) -> int:
        """Makes room for ``wanted`` channels, or as many as ``LIMIT`` allows; how many there is room for."""
        old = self._spectra.get(index)
        have = 0 if old is None else len(old)
        if have >= wanted:
            return have
        each = math.prod(shape) * like.element_size()
        count = min(wanted, have + _room(like.device) // each)
        if count <= have:
            return have
        with torch.inference_mode(False):  # or it could not be filled outside of it
            grown = like.new_empty(count, *shape)
        if old is not None:
            grown[:have] = old
        self._spectra[index] = grown
        return count

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(_size(t) for t in self._spectra.values()) + (0 if self._hidden is None else _size(self._hidden))

    def __deepcopy__(self, memo: dict) -> SpectrumCache:
        return SpectrumCache()

    def __reduce__(self) -> tuple:
        return (SpectrumCache, ())


_caches: WeakSet[SpectrumCache] = WeakSet()
_lock = threading.Lock()


def _room(device: torch.device) -> int:
    limit = LIMIT
    if device.type == "cuda":
        limit = int(torch.cuda.get_device_properties(device).total_memory * SHARE)
    with _lock:
        return limit - sum(cache.nbytes() for cache in _caches)


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()
