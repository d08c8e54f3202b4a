"""The stable functional API. Import these from ``sd_hyena`` itself.

``pipe_or_unet`` is a diffusers pipeline with a UNet of the Stable Diffusion family, or that UNet.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, fingerprint, patch
from .config import SCALINGS
from .errors import UsageError
from .hyena_file import HyenaFile
from .targets import Target, find_targets, select

logger = logging.getLogger(__name__)


def load_hyena(
    pipe_or_unet: Any, path: Path | str, targets: str | None = None, scaling: str | None = None
) -> list[str]:
    """Replaces self-attention layers by the operators in a Hyena file; returns the replaced layers' names.

    Args:
        path: a file written by sd-hyena, or by the 2024 original.
        targets: which of the file's layers to use: names, a comma list, ``high`` or ``all``; everything
            the file holds unless given. A file that does not name its layer needs exactly one name.
        scaling: ``extend`` or ``stretch``, overriding how the file says its blocks grow with larger images.

    Either all layers are replaced or none. Loading onto a layer that already has an operator replaces that
    operator. Raises CheckpointError for an unusable file and UsageError if it does not fit this UNet.
    """
    if scaling not in (None, *SCALINGS):
        raise UsageError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    unet = patch.get_unet(pipe_or_unet)
    file = checkpoint.load(path)
    operators = {}
    for stored, name in choose_layers(unet, file, targets).items():
        if scaling is not None and "scaling" not in file.layers[stored].config.entry.options:
            logger.warning("%s: layer %s has nothing that could be scaled: the scaling is ignored", path, name)
        operators[name] = file.build(stored, scaling)
    if further := fingerprint.difference(file.teacher, unet):
        logger.warning(
            "%s: was taught by another model: this UNet's self-attention weights differ, by %.3g%% in a sample",
            path,
            100 * further,
        )
    patch.attach(unet, operators)
    return list(operators)


def choose_layers(unet: nn.Module, file: HyenaFile, targets: str | None) -> dict[str, str]:
    """Which of a file's layers go where: stored name -> target name. Needs no weights, in ``unet`` or of it.

    Raises UsageError if the choice makes no sense for this file, or a layer does not fit this UNet.
    """
    available = find_targets(unet)
    chosen = _choose(available, file, targets)
    for stored, name in chosen.items():
        config = file.layers[stored].config
        try:
            patch.check_fit(available, name, config)
        except UsageError as error:
            raise UsageError(f"{file.path}: {error}") from None
        heads = available[name].heads
        if "feature_map" in config.entry.options and config.attention_heads != heads:
            raise UsageError(
                f"{file.path}: layer {name} has {heads} attention heads, but the operator was taught by one with "
                f"{config.attention_heads}: it belongs to another architecture"
            )
    return chosen


def _choose(available: dict[str, Target], file: HyenaFile, targets: str | None) -> dict[str, str]:
    if "" in file.layers:
        if targets is None:
            raise UsageError(f"{file.path}: does not say which layer it holds: name it with a target such as IN01")
        names = [t.name for t in select(available, targets)]
        if len(names) != 1:
            raise UsageError(f"{file.path}: holds one layer, but target {targets!r} selects {len(names)}")
        return {"": names[0]}
    if targets is None:
        return {name: name for name in file.layers}
    wanted = [t.name for t in select(available, targets)]
    group = any(word.strip().lower() in ("all", "high") for word in targets.split(","))
    missing = [name for name in wanted if name not in file.layers]
    if (missing and not group) or len(missing) == len(wanted):
        raise UsageError(f"{file.path}: holds no layer {missing[0]}; it has {', '.join(file.layers)}")
    return {name: name for name in wanted if name in file.layers}


def unload_hyena(pipe_or_unet: Any, targets: str | None = None) -> None:
    """Gives the original attention back, everywhere or at ``targets``; outputs are again bit-identical."""
    unet = patch.get_unet(pipe_or_unet)
    patch.detach(unet, None if targets is None else [t.name for t in select(find_targets(unet), targets)])


def set_hyena_enabled(pipe_or_unet: Any, enabled: bool) -> None:
    """Switches all attached layers between Hyena (True) and the attention they replaced (False)."""
    patch.set_enabled(patch.get_unet(pipe_or_unet), enabled)


def save_hyena(pipe_or_unet: Any, path: Path | str) -> None:
    """Writes all attached layers to one file, with the records of the first layer's file.

    Raises UsageError if none is attached, CheckpointError if the file cannot be written.
    """
    layers = patch.attached(patch.get_unet(pipe_or_unet))
    if not layers:
        raise UsageError("there are no Hyena layers to save: load some first")
    operators = {name: layer.operator for name, layer in layers.items()}
    origins = {name: operator.origin for name, operator in operators.items() if operator.origin is not None}
    first = next(iter(origins.values()), None)
    checkpoint.save(
        path,
        operators,
        figures={name: origin.figures for name, origin in origins.items()},
        teacher=first.teacher if first else {},
        training=first.training if first else {},
    )


def list_targets(pipe_or_unet: Any) -> list[str]:
    """Names of all self-attention layers that can be replaced, in the order they run."""
    return list(find_targets(patch.get_unet(pipe_or_unet)))


def load_operator(path: Path | str) -> nn.Module:
    """The operator of a file with one layer, called as ``op(x, size=(h, w))`` on x (B, h * w, D).

    Raises UsageError if the file holds several layers or one in ``core`` form, which cannot run without
    its teacher's projections; CheckpointError if the file is unusable.
    """
    file = checkpoint.load(path)
    if len(file.layers) != 1:
        raise UsageError(f"{path}: holds {len(file.layers)} layers ({', '.join(file.layers)}): use load_hyena")
    (name,) = file.layers
    if file.layers[name].config.form == "core":
        raise UsageError(f"{path}: holds a core operator, which runs on its teacher's projections: use load_hyena")
    return file.build(name)
