"""Our files: one safetensors file holds one or many Hyena layers. The schema is in docs/checkpoint-format.md.

Files of the 2024 sd-hyena are recognised and read by :mod:`sd_hyena.legacy`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from . import legacy
from .arguments import given_path, shown
from .errors import CheckpointError, UsageError
from .files import write_file
from .hyena_file import HyenaFile, LayerInfo, Origin, gather
from .models.kinds import HYENA, is_checkpoint, kind_of
from .nn import Operator, OperatorConfig, build
from .sources import hyena_path
from .targets import NAME
from .tensors import open_tensors

FORMAT, VERSION = "sd-hyena", 1
MAX_LAYERS = 1024
logger = logging.getLogger(__name__)


def save(path: Path | str, operators: Mapping[str, Operator], **sections: Any) -> None:
    """Writes layers to ``path`` atomically.

    ``sections`` may hold ``teacher``, ``training`` (dicts) and ``figures`` (per target, a dict of numbers).
    Raises SdHyenaError if the file cannot be written; what was there before is then untouched.
    """
    figures, teacher, training = (sections.get(name, {}) for name in ("figures", "teacher", "training"))
    write(path, gather(operators, {name: Origin(figures.get(name, {}), teacher, training) for name in operators}))


def write(path: Path | str, file: HyenaFile) -> None:
    """:func:`save` for layers as a file holds them, all of them named."""
    path = given_path(path, "the Hyena file to write")
    write_file(path, to_bytes(file))


def describe(file: HyenaFile) -> dict[str, Any]:
    """All that a file holds but its tensors, ready for JSON. A layer has records of its own where they differ."""
    layers: dict[str, Any] = {}
    for name, layer in file.layers.items():
        layers[name] = {"config": layer.config.to_dict(), "figures": layer.figures}
        for section, shared in (("teacher", file.teacher), ("training", file.training)):
            own = getattr(layer, section)
            if own is not None and own != shared:
                layers[name][section] = own
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "layers": layers,
        "teacher": file.teacher,
        "training": file.training,
    }


def to_bytes(file: HyenaFile) -> bytes:
    """A whole file, :func:`describe` being its metadata."""
    described = {key: value if isinstance(value, str) else json.dumps(value) for key, value in describe(file).items()}
    return serialise(tensors_of(file), described)


def tensors_of(file: HyenaFile) -> dict[str, Tensor]:
    """A file's tensors by the names they have in it, each with memory of its own (the 2024 program shares some)."""
    return {f"layers.{name}.{key}": value.clone() for name, each in file.tensors.items() for key, value in each.items()}


def load(source: Path | str, **where: Any) -> HyenaFile:
    """Reads and checks a file: names, shapes, finite values. Nothing is built or attached.

    ``source`` is a file, a folder or a hub id, or "demo", the bundled model's student; ``where``: options of
    :func:`sd_hyena.sources.hyena_path`. Raises CheckpointError, naming the file and what is wrong with it.
    """
    path = hyena_path(source, **where)
    file = parse(path, *_read(path))
    file.path = path
    return file


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> HyenaFile:
    """:func:`load` for tensors by their names in a file, and what :func:`describe` returned, which those of the 2024
    program do without. Raises UsageError for a ``config`` that is missing or no such thing."""
    for key, value in tensors.items():
        if not isinstance(key, str):
            raise CheckpointError(f"the state dict: {shown(key)} is not the name of a tensor")
        if not isinstance(value, Tensor) or value.is_meta:
            kind = "on the meta device" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
            raise CheckpointError(f"the state dict: {key} is {kind}, not a tensor with values")
    if not isinstance(config, Mapping | None):
        raise UsageError(
            f"config must be a dict, as sd_hyena.hyena_config returns it or json.load reads it, got {shown(config)}"
        )
    if not config and any(key.startswith("layers.") for key in tensors):
        raise UsageError(
            "a state dict says nothing about its operators: give config=, which is what sd_hyena.hyena_config returns, "
            "or what the folder's config.json or the file's metadata says"
        )
    try:
        described = json.loads(json.dumps(dict(config or {})))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"config holds what no config.json can: {error}") from None
    return parse("the state dict", described, dict(tensors))


def parse(label: Path | str, metadata: Mapping[str, Any], tensors: dict[str, Tensor]) -> HyenaFile:
    """:func:`load` for what was read already. ``metadata`` is a file's, or :func:`describe`'s; none for layers of
    the 2024 program. ``label`` starts every message."""
    if metadata.get("format") == FORMAT:
        file = _parse(label, metadata, tensors)
    else:
        file = legacy.parse(label, {key: str(value) for key, value in metadata.items()}, tensors)
    for name, layer in file.layers.items():
        _check_tensors(label, name, layer.config, file.tensors[name])
    return file


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    held = open_tensors(path)
    kind = kind_of(held, held.metadata)
    if kind is not None and kind is not HYENA:
        raise CheckpointError(f"{path}: is {kind.what}, not a Hyena file")
    if is_checkpoint(held):
        raise CheckpointError(f"{path}: is a whole checkpoint, not a Hyena file: give it with -m/--model")
    return held.metadata, {name: held.get(name) for name in held}


def _parse(path: Path | str, metadata: Mapping[str, Any], tensors: dict[str, Tensor]) -> HyenaFile:
    version = str(metadata.get("format_version", ""))
    if version not in map(str, range(1, VERSION + 1)):
        raise CheckpointError(
            f"{path}: format version {version[:20]!r} is not one this sd-hyena reads (1 to {VERSION}): update sd-hyena"
        )
    sections = {name: _json_object(path, metadata, name) for name in ("layers", "teacher", "training")}
    described = sections["layers"]
    if not 1 <= len(described) <= MAX_LAYERS:
        raise CheckpointError(f"{path}: describes {len(described)} layers, expected 1 to {MAX_LAYERS}")
    layers, grouped = {}, {}
    claimed: set[str] = set()
    for name, entry in described.items():
        if not NAME.fullmatch(name) or not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
            raise CheckpointError(f"{path}: the metadata's entry for layer {name!r} is malformed")
        try:
            config = OperatorConfig.from_dict(entry["config"])
        except ValueError as error:
            raise CheckpointError(f"{path}: layer {name}: {error}") from None
        unknown = sorted(set(entry["config"]) - set(config.to_dict()))
        if unknown:
            logger.warning("%s: layer %s: unknown settings ignored: %s", path, name, ", ".join(unknown))
        figures = entry.get("figures")
        if not isinstance(figures, dict):
            figures = {}
        figures = {k: v for k, v in figures.items() if isinstance(v, int | float)}
        own = (value if isinstance(value := entry.get(key), dict) else None for key in ("teacher", "training"))
        layers[name] = LayerInfo(config, figures, *own)
        prefix = f"layers.{name}."
        grouped[name] = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        claimed.update(key for key in tensors if key.startswith(prefix))
    if set(tensors) - claimed:
        raise CheckpointError(
            f"{path}: tensors belong to no described layer: {', '.join(sorted(set(tensors) - claimed)[:3])}"
        )
    return HyenaFile(layers, grouped, sections["teacher"], sections["training"], int(version))


def _json_object(path: Path | str, metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = metadata.get(name, {})
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: metadata section {name!r} is not a JSON object")
    return value


def _check_tensors(path: Path | str, name: str, config: OperatorConfig, tensors: dict[str, Tensor]) -> None:
    label = f"layer {name}: " if name else ""
    try:
        with torch.device("meta"):
            expected = build(config).state_dict()
    except ValueError as error:
        raise CheckpointError(f"{path}: {label}{error}") from None
    for problem, keys in (("missing", set(expected) - set(tensors)), ("unexpected", set(tensors) - set(expected))):
        if keys:
            raise CheckpointError(
                f"{path}: {label}{problem} tensors: {', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''}"
            )
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(
                f"{path}: {label}{key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            )
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {label}{key} has type {value.dtype}, expected floating point")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {label}{key} holds NaN or infinite values")
