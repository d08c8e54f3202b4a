"""Loading teachers from wherever they are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, SdHyenaError, UsageError
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

    quiet_libraries()
    from .schedule import Marked, read_marks, set_schedule

    dtype, marked, tensors = dtype or torch.float32, Marked(), None
    try:
        if source.kind == "file":
            from .single_file import load_single_file, open_checkpoint

            checkpoint = open_checkpoint(source.location, source.name)
            pipe, marked, tensors = load_single_file(checkpoint, dtype), read_marks(checkpoint), checkpoint.tensors
        else:
            from .folders import load_folder
            from .hub import fetch

            folder, variant = fetch(source) if source.kind == "hub" else (Path(source.location), source.variant)
            pipe = load_folder(folder, source.name, variant, dtype)
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
    check_finite(pipe, source.name, dtype, tensors)
    return pipe


def check_finite(pipe: Any, name: str, dtype: torch.dtype, tensors: Tensors | None = None) -> None:
    """Raises CheckpointError, naming the tensor, if a weight of the pipeline is NaN or infinite.

    ``tensors``: the file that the weights came from, whose names say more than the pipeline's.
    """
    for component, module in pipe.components.items():
        for key, weight in module.named_parameters() if hasattr(module, "named_parameters") else ():
            if is_finite(weight):
                continue
            found = f"{component}.{key}"
            if tensors is not None:
                stored = next((each for each in tensors if not is_finite(tensors.get(each))), None)
                if stored is None:
                    raise CheckpointError(
                        f"model {name}: {found} is beyond the range of {dtype}: compute in another type"
                    )
                found = stored
            raise CheckpointError(f"model {name}: {found} holds NaN or infinite values")


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are: their sum tells in one pass, and only if it does not they are looked at one by one."""
    import torch

    if not weight.is_floating_point():
        return True
    weight = weight.float() if weight.dtype.itemsize == 1 else weight
    return bool(torch.isfinite(weight.sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
