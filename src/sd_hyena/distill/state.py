"""What a training run keeps besides the weights: a lock on its folder, the state to resume from, the average."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SdHyenaError, UsageError
from ..files import atomic_path

STATE, LOCK = ".train-state.pt", ".train-lock"


@contextlib.contextmanager
def locked(
    folder: Path, name: str = LOCK, user: str = "training", wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Creates ``folder`` and holds it for one run, by a lock file ``name``.

    If another ``user`` run has it: raises UsageError, or, with ``wait``, says so in a line and waits for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / name, "w")  # noqa: SIM115 - held open for the whole run
    except OSError as error:
        raise SdHyenaError(f"output folder {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            busy = f"output folder {folder} is in use by another {user} run"
            if wait is None:
                raise UsageError(busy) from None
            wait(f"{busy}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        for stray in folder.glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        yield
    finally:
        handle.close()


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's resume state atomically."""
    with atomic_path(folder / STATE) as temporary:
        torch.save(state, temporary)


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
