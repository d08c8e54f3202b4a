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
from .errors import CheckpointError
from .files import atomic_path, hyena_path
from .hyena_file import HyenaFile, LayerInfo
from .models.kinds import HYENA, is_checkpoint, kind_of
from .nn import Operator, OperatorConfig, build
from .placement import weights_of
from .targets import NAME
from .tensors import open_tensors

FORMAT, VERSION = "sd-hyena", 1
MAX_LAYERS = 1024
logger = logging.getLogger(__name__)


def save(path: Path | str, operators: Mapping[str, Operator], **sections: Any) -> None:
    """Writes layers to ``path`` atomically, mode 0644.

    ``sections`` may hold ``teacher``, ``training`` (dicts) and ``figures`` (per target, a dict of numbers).
    Raises CheckpointError if the file cannot be written; what was there before is then untouched.
    """
    operators = {name: operator.folded() for name, operator in operators.items()}
    figures = sections.get("figures", {})
    layers = {
        name: {"config": operator.config.to_dict(), "figures": figures.get(name, {})}
        for name, operator in operators.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "layers": json.dumps(layers),
        "teacher": json.dumps(sections.get("teacher", {})),
        "training": json.dumps(sections.get("training", {})),
    }
    tensors = {
        f"layers.{name}.{key}": value
        for name, operator in operators.items()
        for key, value in weights_of(operator).items()
    }
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(serialise(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror or error}") from error


def load(path: Path | str) -> HyenaFile:
    """Reads and checks a file: names, shapes, finite values. Nothing is built or attached.

    ``path`` may be "demo", the bundled model's student. Raises CheckpointError, naming the file and what is
    wrong with it.
    """
    path = hyena_path(path)
    metadata, tensors = _read(path)
    if metadata.get("format") == FORMAT:
        file = _parse(path, metadata, tensors)
    else:
        file = legacy.parse(path, metadata, tensors)
    file.path = path
    for name, layer in file.layers.items():
        _check_tensors(path, name, layer.config, file.tensors[name])
    return file


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    held = open_tensors(path)
    kind = kind_of(held, held.metadata)
    if kind is not None and kind is not HYENA:
        raise CheckpointError(f"{path}: is {kind.what}, not a Hyena file")
    if is_checkpoint(held):
        raise CheckpointError(f"{path}: is a whole checkpoint, not a Hyena file: give it with -m/--model")
    return held.metadata, {name: held.get(name) for name in held}


def _parse(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> HyenaFile:
    version = metadata.get("format_version", "")
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
        layers[name] = LayerInfo(config, {k: v for k, v in figures.items() if isinstance(v, int | float)})
        prefix = f"layers.{name}."
        grouped[name] = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        claimed.update(key for key in tensors if key.startswith(prefix))
    if set(tensors) - claimed:
        raise CheckpointError(
            f"{path}: tensors belong to no described layer: {', '.join(sorted(set(tensors) - claimed)[:3])}"
        )
    return HyenaFile(layers, grouped, sections["teacher"], sections["training"], int(version))


def _json_object(path: Path, metadata: dict[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(name, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: metadata section {name!r} is not a JSON object")
    return value


def _check_tensors(path: Path, name: str, config: OperatorConfig, tensors: dict[str, Tensor]) -> None:
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
