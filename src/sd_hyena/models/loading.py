"""Loading teachers from wherever they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, SdHyenaError, UsageError
from ..finite import NOT_FINITE, beyond, is_finite
from ..texts import reason
from .choices import ModelChoices
from .locate import ModelSource
from .quiet import quiet_libraries

if TYPE_CHECKING:
    import torch

    from ..tensors import Tensors

logger = logging.getLogger(__name__)


def unet_skeleton(source: ModelSource) -> torch.nn.Module | None:
    """The UNet without weights, for checking targets and sizes early; None if only loading can tell."""
    if source.kind == "hub":
        return None
    if source.family is None:
        from .parts import build

        return build(Path(source.location) / "unet", "UNet2DConditionModel", source.name)
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(source.family.config("unet"))


def load_pipeline(
    source: ModelSource, device: str = "cpu", dtype: torch.dtype | None = None, choices: ModelChoices | None = None
) -> Any:
    """A Stable Diffusion pipeline in evaluation mode, without a safety checker.

    ``choices`` say what the model predicts, where it does not or says it wrongly. Only hub ids need a network.
    Raises SdHyenaError if the model cannot be loaded, CheckpointError if a weight is NaN or infinite.
    """
    import torch

    from ..tensors import open_tensors, weights_in

    quiet_libraries()
    from .schedule import Marked, read_marks, set_schedule

    dtype, marked = dtype or torch.float32, Marked()
    try:
        if source.kind == "file":
            from .single_file import load_single_file, open_checkpoint

            checkpoint = open_checkpoint(source.location, source.name)
            pipe, marked = load_single_file(checkpoint, dtype), read_marks(checkpoint)

            def stored(component: str) -> tuple[str, Tensors]:
                return "", checkpoint.tensors

        else:
            from .folders import load_folder
            from .hub import fetch

            folder, variant = fetch(source) if source.kind == "hub" else (Path(source.location), source.variant)
            pipe = load_folder(folder, source.name, variant, dtype)

            def stored(component: str) -> tuple[str, Tensors]:
                own = folder / component
                return f"{component}.", open_tensors(own, variant if variant in weights_in(own) else "")

    except (SdHyenaError, UsageError):
        raise
    except Exception as error:  # diffusers and transformers raise many unrelated types
        raise SdHyenaError(f"model {source.name}: cannot be loaded: {reason(error)}") from error
    set_schedule(pipe, source.name, choices, marked)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae):
        module.eval().requires_grad_(False)
    pipe = pipe.to(device)
    check_finite(pipe, source.name, dtype, stored)
    return pipe


def check_finite(pipe: Any, name: str, dtype: torch.dtype, stored: Callable[[str], tuple[str, Tensors]]) -> None:
    """Raises CheckpointError, naming the tensor, if a weight of the pipeline is NaN or infinite. ``stored`` gives the
    tensors that a component's weights came from, and what to put before their names."""
    for component, module in pipe.components.items():
        for key, weight in module.state_dict(keep_vars=True).items() if hasattr(module, "state_dict") else ():
            if is_finite(weight):
                continue
            prefix, held = stored(component)
            damaged = next((each for each in held if not is_finite(held.get(each))), None)
            if damaged is None:
                raise CheckpointError(f"model {name}: {component}.{key} {beyond(dtype)}")
            raise CheckpointError(f"model {name}: {prefix}{damaged} {NOT_FINITE}")
