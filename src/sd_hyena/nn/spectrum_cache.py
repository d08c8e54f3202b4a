"""Keeps kernel spectra between calls at inference, where they do not depend on the input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

MAX_CELLS = 128 * 128  # above 1024 px the spectra would outweigh the activations


class SpectrumCache:
    """Spectra by key, dropped as soon as a filter parameter is replaced, moved or changed in place.

    It lives outside the module's buffers, so it never reaches a saved file.
    """

    def __init__(self) -> None:
        self._state: Hashable = None
        self._entries: dict[Hashable, Tensor] = {}

    def get(
        self, key: Hashable, parameters: Iterable[nn.Parameter], cells: int, compute: Callable[[], Tensor]
    ) -> Tensor:
        """``compute()``, or what it returned last time for ``key`` and the same parameter values."""
        parameters = list(parameters)
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return compute()
        if cells > MAX_CELLS:
            self._entries.clear()
            return compute()
        state = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in parameters)
        if state != self._state:
            self._state, self._entries = state, {}
        if key not in self._entries:
            with torch.no_grad():
                self._entries[key] = compute()
        return self._entries[key]

    def __deepcopy__(self, memo: dict) -> SpectrumCache:
        return SpectrumCache()

    def __reduce__(self) -> tuple:
        return (SpectrumCache, ())
