"""Reading some self-attention layers of a teacher, and nothing else of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SdHyenaError
from .fingerprint import describe
from .models import ModelSource, single_file_family, unet_skeleton
from .targets import Target, find_targets, select
from .tensors import open_tensors

logger = logging.getLogger(__name__)
Read = Callable[[str], Tensor]


@dataclass
class PartialTeacher:
    """A teacher of whose UNet only some self-attention layers have weights; the rest is on the meta device.

    ``record`` is what :func:`.fingerprint.fingerprint` says of the whole.
    """

    unet: nn.Module
    record: dict[str, Any]
    vae_scale_factor: int = 8


def read_layers(
    source: ModelSource, target: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> PartialTeacher | None:
    """The layers that ``target`` names, on ``device`` in ``dtype`` (float32 unless given), in evaluation mode.

    None, logged in one line, if only loading the whole model can tell which layers it has. Raises SdHyenaError if a
    weight is missing, damaged or not finite, UsageError if the UNet has no such layer.
    """
    skeleton = unet_skeleton(source)
    if skeleton is None:
        logger.info("%s: its layers cannot be told from outside, so the whole model is loaded", source.name)
        return None
    stored = _stored_in_file(source, skeleton) if source.kind == "file" else _stored_in_folder(source)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}

    def get(name: str) -> Tensor:
        tensor = stored(name).to(dtype or torch.float32)
        if tensor.shape != expected[name]:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name])}"
            raise SdHyenaError(f"model {source.name}: {name} has shape {shapes}")
        return tensor

    record = describe(_pipeline_class(source), skeleton, get)
    skeleton.eval().requires_grad_(False)
    for chosen in select(find_targets(skeleton), target):
        attention = skeleton.get_submodule(chosen.path)
        weights = {key: get(f"{chosen.path}.{key}") for key in attention.state_dict()}
        for key, tensor in weights.items():
            if not tensor.isfinite().all():
                raise SdHyenaError(f"model {source.name}: {chosen.path}.{key} holds NaN or infinite values")
        attention.load_state_dict(weights, assign=True)
        attention.to(device)
    return PartialTeacher(skeleton, record)


def _stored_in_folder(source: ModelSource) -> Read:
    return open_tensors(Path(source.location) / "unet").get


def _stored_in_file(source: ModelSource, skeleton: nn.Module) -> Read:
    """Within a self-attention layer, LDM and diffusers have the same names."""
    tensors = open_tensors(source.location)
    targets = {t.path: t for t in find_targets(skeleton).values()}

    def get(name: str) -> Tensor:
        path, marker, rest = name.partition(".attn1.")
        target: Target = targets[path + marker[:-1]]
        return tensors.get(f"{target.ldm_key}.{rest}")

    return get


def _pipeline_class(source: ModelSource) -> str:
    if source.kind == "file":
        return single_file_family(source).pipeline
    index = json.loads((Path(source.location) / "model_index.json").read_text())
    return index["_class_name"]
