"""Components of diffusers folders: whether they can be used, told before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UsageError
from ..texts import reason
from . import configs
from .choices import PREDICTIONS
from .configs import MAX_NUMBER, check_config, read_json
from .kinds import SUPPORTED

if TYPE_CHECKING:
    from torch import nn

# What diffusers and transformers rename when they load weights of earlier versions.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_OLD_PARTS = ("vae",)
MAX_TIMESTEPS = 100_000
MAX_TOKENS = 10_000


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
    config = read_json(folder / "config.json", name, f"{folder.name}/")
    what = f"model {name}: {folder.name}/config.json cannot be used"
    cls = component_class(kind, folder.name, name)
    if hasattr(cls, "from_config"):
        check_config(config, cls.__init__, what)
        return configs.build(lambda: cls.from_config(config), what)
    if not hasattr(cls, "config_class"):
        raise CheckpointError(f"model {name}: its {folder.name} is a {kind}, which has no weights")
    check_config(config, cls.config_class, what)
    return configs.build(lambda: cls(cls.config_class(**config)), what)


def component_class(kind: str | None, component: str, name: str, library: str | None = None) -> Any:
    """A class of diffusers or transformers, or of one of diffusers' pipelines, ``library``. Raises CheckpointError."""
    import diffusers
    import transformers

    places = [diffusers, transformers, getattr(diffusers.pipelines, str(library), None)]
    found = next((getattr(place, str(kind)) for place in places if hasattr(place, str(kind))), None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise CheckpointError(f"model {name}: its {component} is a {kind}, no class of diffusers or transformers")
    return found


def check_tokenizer(folder: Path, name: str) -> None:
    """Raises CheckpointError for a length of texts that no text encoder has, and for a vocabulary that is none."""
    what = f"model {name}: {folder.name}"
    for file in ("tokenizer_config.json", "vocab.json"):
        content = read_json(folder / file, name, f"{folder.name}/") if (folder / file).is_file() else {}
        length = content.get("model_max_length", 77)
        if file == "tokenizer_config.json" and not (type(length) is int and 3 <= length <= MAX_TOKENS):
            raise CheckpointError(f"{what}/{file}: model_max_length is {length!r}, but must be from 3 to {MAX_TOKENS}")
        if file == "vocab.json" and not all(type(n) is int and 0 <= n < MAX_NUMBER for n in content.values()):
            raise CheckpointError(f"{what}/{file}: does not number its words")


def check_scheduler(folder: Path, kind: str | None, name: str) -> None:
    """Raises UsageError for a kind of noise that is not Stable Diffusion's, CheckpointError for a configuration that
    cannot be used."""
    import diffusers

    config = read_json(folder / "scheduler" / "scheduler_config.json", name, "scheduler/")
    what = f"model {name}: scheduler/scheduler_config.json cannot be used"
    scheduler_class: Any = getattr(diffusers, str(kind), None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        raise UsageError(f"model {name}: its scheduler {kind} is none of diffusers' schedulers")
    total, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if type(total) is not int:
        raise CheckpointError(f"{what}: num_train_timesteps is {total!r}, no whole number")
    if not 1 <= total <= MAX_TIMESTEPS:
        raise CheckpointError(f"{what}: num_train_timesteps is {total}, but must be from 1 to {MAX_TIMESTEPS}")
    if betas is not None and not (isinstance(betas, list) and len(betas) == total):
        raise CheckpointError(f"{what}: trained_betas must be a list of num_train_timesteps, {total}, numbers")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in (*PREDICTIONS, "sample"):
        raise CheckpointError(f"{what}: prediction_type is {prediction!r}, not one of {', '.join(PREDICTIONS)}")
    check_config(config, scheduler_class, what)
    try:
        scheduler = scheduler_class.from_config(config)  # type: ignore[attr-defined]
        if not hasattr(scheduler, "init_noise_sigma"):
            raise UsageError(f"model {name}: its scheduler is a {kind}: sd-hyena works on {SUPPORTED}")
        signal = getattr(scheduler, "alphas_cumprod", None)
        if signal is not None and not bool(((signal >= 0) & (signal <= 1)).all()):
            raise ValueError("its betas are not from 0 to 1")
        scheduler.set_timesteps(min(4, total))
        if not bool((scheduler.timesteps >= 0).all()):
            raise ValueError("its timesteps are negative")
    except UsageError:
        raise
    except Exception as error:  # whatever its arithmetic leads to
        raise CheckpointError(f"{what}: {reason(error)}") from None


def _usual(key: str, component: str) -> str:
    if component in _OLD_PARTS:
        for old, new in _RENAMED.items():
            key = key.replace(old, new)
    return key.removeprefix("text_model.") if component.startswith("text_encoder") else key
