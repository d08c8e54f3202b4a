"""Reading the state that a training run goes on from: a file as untrusted as any other."""

from __future__ import annotations

import contextlib
import logging
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import strict_json
from ..errors import SdHyenaError
from ..finite import NOT_FINITE, first_not_finite
from ..texts import reason
from .state import STATE, Average

logger = logging.getLogger(__name__)

_KINDS: dict[str, type] = {
    "step": int, "stage": int, "micro_batch_size": int, "seed": int, "settings": str, "identity": str,
    "students": dict, "optimizer": dict, "scheduler": dict, "scaler": dict, "average": dict,
}  # fmt: skip


def read_state(folder: Path) -> dict[str, Any] | None:
    """The resume state, its settings and identity as what their JSON says, or None if the folder has none.

    Raises SdHyenaError, naming the file, for one that is damaged or no such state.
    """
    path = folder / STATE
    if not path.exists():
        return None
    with resuming(path):
        state = _read(path)
        if not isinstance(state, dict) or state.keys() != _KINDS.keys():
            raise ValueError("its parts are not those of a state")
        for name, kind in _KINDS.items():
            if not isinstance(state[name], kind) or isinstance(state[name], bool):
                raise ValueError(f"its {name} is of type {type(state[name]).__name__}")
        if state["stage"] not in (1, 2) or state["step"] < 0 or not 0 <= state["seed"] < 2**63:
            raise ValueError(f"stage {state['stage']}, step {state['step']}, seed {state['seed']} cannot be")
        if state["micro_batch_size"] < 1:
            raise ValueError(f"micro-batches of {state['micro_batch_size']} cannot be")
        if name := first_not_finite(state):
            raise ValueError(f"{name} {NOT_FINITE}")
        for name in ("settings", "identity"):
            state[name] = strict_json.loads(state[name])
            if not isinstance(state[name], dict):
                raise ValueError(f"its {name} are no JSON object")
    return state


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError("it is no file")  # a pipe may never end
    try:
        with zipfile.ZipFile(path) as archive:  # its checksums, which torch does not look at
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            if stored and archive.testzip() is None:
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many types for a damaged file
        logger.debug("%s: %s", path, error)
    raise ValueError("it is damaged, or no state of a training run")


@contextlib.contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Within the block, whatever goes wrong is the state's doing: one line that names its file."""
    try:
        yield
    except Exception as error:  # torch raises many types for what does not fit
        raise SdHyenaError(f"{path}: cannot resume from it ({reason(error)}): remove it to start anew") from None


def restore(optimizer: torch.optim.Optimizer, scheduler: Any, average: Average, state: Mapping[str, Any]) -> None:
    """Gives an optimizer, its schedule and the average what a state holds of them. Raises ValueError, or whatever
    loading does, for what does not fit: by itself that takes almost any numbers and shapes."""
    fresh = _settings(optimizer, scheduler, average.state_dict())
    if state["scheduler"].keys() != scheduler.state_dict().keys():
        raise ValueError("its schedule is another")
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    average.load_state_dict(state["average"])
    if _settings(optimizer, scheduler, state["average"]) != fresh:
        raise ValueError("its optimizer, schedule or average has other settings")
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        moments = optimizer.state[parameter]
        if moments and moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"its optimizer holds {', '.join(map(str, moments))} of a weight")
        for name, value in moments.items():
            if value.shape != (() if name == "step" else parameter.shape) or (name != "exp_avg" and (value < 0).any()):
                raise ValueError(f"its optimizer's {name} is not one of a weight of shape {tuple(parameter.shape)}")
    if scheduler.last_epoch > 0 and not any(optimizer.state.values()):
        raise ValueError("its optimizer holds nothing")
    rates = [base * of(scheduler.last_epoch) for base, of in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    if not rates == scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]:
        raise ValueError("its learning rates are not those of its schedule")


def _settings(optimizer: torch.optim.Optimizer, scheduler: Any, average: Mapping[str, Any]) -> list[Any]:
    """What training does not change."""
    groups = [{k: v for k, v in group.items() if k not in ("lr", "params")} for group in optimizer.param_groups]
    kept = {k: v for k, v in average.items() if k not in ("optimization_step", "shadow_params")}
    shapes = [tensor.shape for tensor in average.get("shadow_params", [])]
    return [groups, scheduler.base_lrs, kept, shapes]
