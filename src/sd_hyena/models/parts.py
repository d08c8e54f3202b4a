"""Components of diffusers folders: whether they can be used, told before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import strict_json
from ..errors import CheckpointError, UsageError
from .choices import PREDICTIONS
from .kinds import SUPPORTED

if TYPE_CHECKING:
    from torch import nn

# What diffusers and transformers rename when they load weights of earlier versions.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_OLD_PARTS = ("vae",)


def check_weights(folder: Path, kind: str, name: str, variant: str = "") -> None:
    """Reads names and shapes alone. Raises CheckpointError, naming a tensor, where one is missing or does not fit."""
    from ..tensors import open_tensors

    held = open_tensors(folder, variant)
    shapes = {_usual(key, folder.name): shape for key, shape in held.shapes.items()}
    config = read_json(folder / "config.json", name, f"{folder.name}/")
    # Tied weights are stored once, and buffers are computed.
    for key, weight in build(folder, kind, name).named_parameters():
        got = shapes.get(_usual(key, folder.name))
        label = f"model {name}: its {folder.name.replace('_', ' ')}"
        if got is None:
            raise CheckpointError(f"{label} lacks {key}: download or copy it again")
        if got != tuple(weight.shape) and not config.get("quantization_config"):  # which are packed
            raise CheckpointError(
                f"{label} has another shape of {key}, {got}, than its config.json asks for, {tuple(weight.shape)}"
            )


def build(folder: Path, kind: str, name: str) -> nn.Module:
    """The component without weights, on the meta device. Raises CheckpointError if its configuration cannot be
    used."""
    import diffusers
    import torch
    import transformers

    config = read_json(folder / "config.json", name, f"{folder.name}/")
    model_class: Any = getattr(diffusers, kind, None) or getattr(transformers, kind, None)
    if model_class is None:
        raise CheckpointError(f"model {name}: its {folder.name} is a {kind}, no class of diffusers or transformers")
    try:
        with torch.device("meta"):
            if hasattr(model_class, "from_config"):
                return model_class.from_config(config)
            return model_class(model_class.config_class(**config))
    except Exception as error:  # whatever the numbers in it lead to
        raise CheckpointError(f"model {name}: {folder.name}/config.json cannot be used: {one_line(error)}") from None


def check_scheduler(folder: Path, kind: str | None, name: str) -> None:
    """Raises UsageError for a kind of noise that is not Stable Diffusion's, CheckpointError for a configuration that
    cannot be used."""
    import diffusers

    config = read_json(folder / "scheduler" / "scheduler_config.json", name, "scheduler/")
    what = f"model {name}: scheduler/scheduler_config.json cannot be used"
    scheduler_class = getattr(diffusers, str(kind), None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        raise UsageError(f"model {name}: its scheduler {kind} is none of diffusers' schedulers")
    if type(config.get("num_train_timesteps", 1000)) is not int:
        raise CheckpointError(f"{what}: num_train_timesteps is {config['num_train_timesteps']!r}, no whole number")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in (*PREDICTIONS, "sample"):
        raise CheckpointError(f"{what}: prediction_type is {prediction!r}, not one of {', '.join(PREDICTIONS)}")
    try:
        scheduler = getattr(diffusers, str(kind)).from_config(config)
    except Exception as error:  # whatever its arithmetic leads to
        raise CheckpointError(f"{what}: {one_line(error)}") from None
    if not hasattr(scheduler, "init_noise_sigma"):
        raise UsageError(f"model {name}: its scheduler is a {kind}: sd-hyena works on {SUPPORTED}")


def read_json(path: Path, name: str, folder: str = "") -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, which calls the file by its name after ``folder``."""
    try:
        content = strict_json.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model {name}: {folder}{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"model {name}: {folder}{path.name} is not a JSON object")
    return content


def one_line(error: Exception) -> str:
    """Where a library gives a reason, the short of it."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _usual(key: str, component: str) -> str:
    if component in _OLD_PARTS:
        for old, new in _RENAMED.items():
            key = key.replace(old, new)
    return key.removeprefix("text_model.") if component.startswith("text_encoder") else key
