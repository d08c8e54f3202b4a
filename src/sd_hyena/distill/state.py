"""What a training run keeps besides the weights: the state to resume from, the average."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SdHyenaError
from ..files import write_file

STATE = ".train-state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's resume state atomically. Raises SdHyenaError if it cannot be written."""
    write_file(folder / STATE, serialised(state))


def serialised(content: Any) -> bytes:
    """What torch.save would write: to a file itself, it has no words for a full disk."""
    torch.save(content, data := io.BytesIO())
    return data.getvalue()


def load_state(folder: Path) -> dict[str, Any] | None:
    """The resume state, or None if the folder has none. Raises SdHyenaError if it is damaged."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise SdHyenaError(
            f"{path}: cannot resume from it ({os.path.basename(str(error))[:80]}): remove it to start anew"
        ) from None


class Average:
    """The exponential moving average of a module's weights, or nothing at all for a decay of 0."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = list(module.parameters())
        self._ema = EMAModel(self._parameters, decay=decay) if decay else None

    def update(self) -> None:
        """Takes in the weights as they are now."""
        if self._ema is not None:
            self._ema.step(self._parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the module has its averaged weights."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self._ema.restore(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        return self._ema.state_dict() if self._ema is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ema is not None:
            self._ema.load_state_dict(state)
            self._ema.to(self._parameters[0].device)  # states are read to the CPU
