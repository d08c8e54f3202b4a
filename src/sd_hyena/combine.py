"""Hyena files made of Hyena files: some of the layers, several files in one, other types of numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from .errors import UsageError
from .hyena_file import HyenaFile
from .targets import GROUPS, NAME, parse_names

logger = logging.getLogger(__name__)


def select_layers(file: HyenaFile, targets: str) -> HyenaFile:
    """The file with the layers that a comma list names, ``IN07`` meaning all of ``IN07.0``, ``IN07.1`` ...; with one
    name, a file that does not name its layer gets that name.

    Raises UsageError for a name that it does not hold, and for ``high``, which depends on the model.
    """
    words = parse_names(targets)
    if "high" in words:
        raise UsageError(f"{file.label}: target 'high' depends on the model; name its layers, {', '.join(file.layers)}")
    if "" in file.layers:
        if len(words) != 1 or words[0] in GROUPS:
            raise UsageError(f"{file.label}: holds one layer, but target {targets!r} is not one name")
        return _only(file, {"": words[0]})
    chosen: dict[str, str] = {}
    for word in words:
        found = [name for name in file.layers if word in ("all", name) or name.startswith(f"{word}.")]
        if not found:
            raise UsageError(f"{file.label}: holds no layer {word}; it has {', '.join(file.layers)}")
        chosen |= {name: name for name in found}
    return _only(file, {name: name for name in file.layers if name in chosen})


def _only(file: HyenaFile, names: dict[str, str]) -> HyenaFile:
    layers = {new: file.layers[old] for old, new in names.items()}
    return replace(file, layers=layers, tensors={new: file.tensors[old] for old, new in names.items()})


def require_names(file: HyenaFile) -> None:
    """Raises UsageError for a file that does not say which layer it holds."""
    if not all(NAME.fullmatch(name) for name in file.layers):
        raise UsageError(
            f"{file.label}: does not say which layer it holds: name it with 'sd-hyena convert -t', as in -t IN01"
        )


def merge(files: Sequence[HyenaFile], prefer: str = "") -> HyenaFile:
    """All layers of all files in one, each with its own records; those of the first file are the whole file's.

    A layer that is in several is taken from the first or last of them as ``prefer`` says; with "" that is a
    UsageError. Files that were taught by different models are warned of.
    """
    merged = replace(files[0], layers={}, tensors={}, path=None)
    source: dict[str, HyenaFile] = {}
    for file in files:
        require_names(file)
        for name in file.layers:
            if name in source and not prefer:
                raise UsageError(f"layer {name} is in both {source[name].label} and {file.label}: give --prefer first "
                                 "or --prefer last, or leave one out")  # fmt: skip
            if name in source and prefer == "first":
                continue
            source[name] = file
    for name, file in source.items():
        origin = file.origin(name)
        merged.layers[name] = replace(file.layers[name], teacher=origin.teacher, training=origin.training)
        merged.tensors[name] = file.tensors[name]
    taught: dict[str, str] = {}
    for name in source:
        if teacher := merged.origin(name).teacher:
            taught.setdefault(teacher.get("attention_sha256") or json.dumps(teacher, sort_keys=True), name)
    if len(taught) > 1:
        logger.warning(
            "these layers were taught by different models (%s, for instance): no model fits them all",
            " and ".join(list(taught.values())[:2]),
        )
    return merged


def cast(file: HyenaFile, dtype: torch.dtype) -> HyenaFile:
    """The file with all weights in one type. Raises UsageError for a value that this type cannot hold."""
    tensors = {name: {key: t.to(dtype) for key, t in each.items()} for name, each in file.tensors.items()}
    for name, each in tensors.items():
        for key, value in each.items():
            if not torch.isfinite(value).all():
                largest = file.tensors[name][key].abs().max().item()
                raise UsageError(
                    f"{file.label}: layer {name}: {key} has values up to {largest:.3g}, too large for "
                    f"{str(dtype).removeprefix('torch.')}: take bfloat16 or float32"
                )
    return replace(file, tensors=tensors)


def dtype_of(tensors: dict[str, torch.Tensor]) -> str:
    """The type of one layer's weights, or types where they differ."""
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
