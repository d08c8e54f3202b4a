"""Reading some self-attention layers of a teacher, and nothing else of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SdHyenaError, UsageError
from ..fingerprint import describe
from ..finite import NOT_FINITE, beyond, is_finite
from ..targets import find_targets, select
from ..tensors import Tensors, open_tensors, weights_in
from .folders import check_folder
from .loading import unet_skeleton
from .locate import ModelSource
from .parts import read_json
from .single_file import open_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class PartialTeacher:
    """A teacher of whose UNet only some self-attention layers have weights; the rest is on the meta device.

    ``record`` is what :func:`..fingerprint.fingerprint` says of the whole.
    """

    unet: nn.Module
    record: dict[str, Any]
    vae_scale_factor: int = 8  # of all families


def read_layers(
    source: ModelSource, target: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> PartialTeacher | None:
    """The layers that ``target`` names, on ``device`` in ``dtype`` (float32 unless given), in evaluation mode.

    None, logged in one line, if only loading the whole model can tell which layers it has. Raises CheckpointError if a
    weight is missing, of another shape, or not finite, UsageError if the UNet has no such layer.
    """
    found = _cached(source) if source.kind == "hub" else source
    if found is None:
        logger.info("model %s: is not in the cache of downloads, so all of it is loaded for its layers", source.name)
        return None
    unet = unet_skeleton(found)
    assert unet is not None
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    kind, tensors, stored_as = _in_file(found, unet) if found.kind == "file" else _in_folder(found)

    def get(name: str) -> Tensor:
        stored = stored_as(name)
        held = tensors.get(stored)
        tensor = held.to(dtype or torch.float32)
        if tensor.shape != shapes[name]:
            got, expected = tuple(tensor.shape), tuple(shapes[name])
            raise CheckpointError(f"model {source.name}: {stored} has shape {got}, expected {expected}")
        if not is_finite(tensor):
            what = beyond(tensor.dtype) if is_finite(held) else NOT_FINITE
            raise CheckpointError(f"model {source.name}: {stored} {what}")
        return tensor

    record = describe(kind, unet, get)
    unet.eval().requires_grad_(False)
    for chosen in select(find_targets(unet), target):
        attention = unet.get_submodule(chosen.path)
        weights = {key: get(f"{chosen.path}.{key}") for key in attention.state_dict()}
        attention.load_state_dict(weights, assign=True)
        attention.to(device)
    return PartialTeacher(unet, record)


def _cached(source: ModelSource) -> ModelSource | None:
    """The folder in the cache of downloads that a hub id stands for, or None if it is not, or not all, there."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(source.location, local_files_only=True))
        variant = check_folder(folder, source.name, source.variant)
    except (errors.LocalEntryNotFoundError, ValueError, SdHyenaError, UsageError):
        return None
    return replace(source, kind="folder", location=str(folder), variant=variant)


def _in_folder(source: ModelSource) -> tuple[str, Tensors, Callable[[str], str]]:
    """The pipeline's class, the weights, and what a weight is called there."""
    folder = Path(source.location)
    variant = source.variant if source.variant in weights_in(folder / "unet") else ""
    index = read_json(folder / "model_index.json", source.name)
    return index["_class_name"], open_tensors(folder / "unet", variant), lambda name: name


def _in_file(source: ModelSource, unet: nn.Module) -> tuple[str, Tensors, Callable[[str], str]]:
    """The same of a single file. Within a self-attention layer, LDM and diffusers have the same names."""
    checkpoint = open_checkpoint(source.location, source.name, whole=False)
    keys = {target.path: target.ldm_key for target in find_targets(unet).values()}

    def stored_as(name: str) -> str:
        path, _, rest = name.partition(".attn1.")
        key = f"{keys[f'{path}.attn1']}.{rest}"
        return checkpoint.names.get(key, key)

    return checkpoint.family.pipeline, checkpoint.tensors, stored_as
