"""Keeps kernel spectra between calls at inference, where they do not depend on the input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn

LIMIT = 2**30  # bytes that all layers of a process keep together


class SpectrumCache:
    """Spectra, and what they are made from, by key; all dropped as soon as a parameter they depend on is
    replaced, moved or changed in place.

    Nothing is kept beyond ``LIMIT`` over all layers. It lives outside the module's buffers, so it never
    reaches a saved file.
    """

    def __init__(self) -> None:
        _caches.add(self)
        self._state: Hashable = None
        self._entries: dict[tuple, Tensor] = {}

    def get(self, key: tuple, parameters: Iterable[nn.Parameter], keep: bool, compute: Callable[[], Tensor]) -> Tensor:
        """What was kept for ``key`` and the same parameter values, or else ``compute()``."""
        state = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in parameters)
        if state != self._state:
            self._state, self._entries = state, {}
        if key in self._entries:
            return self._entries[key]
        with torch.no_grad():
            spectrum = compute()
        if keep and sum(cache.nbytes() for cache in _caches) + _size(spectrum) <= LIMIT:
            self._entries[key] = spectrum
        return spectrum

    def nbytes(self, kind: str | None = None) -> int:
        """Bytes held, or those whose keys begin with ``kind``."""
        return sum(_size(t) for key, t in self._entries.items() if kind is None or key[0] == kind)

    def __deepcopy__(self, memo: dict) -> SpectrumCache:
        return SpectrumCache()

    def __reduce__(self) -> tuple:
        return (SpectrumCache, ())


_caches: WeakSet[SpectrumCache] = WeakSet()


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()
