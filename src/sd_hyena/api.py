"""The stable functional API. Import these from ``sd_hyena`` itself.

``pipe_or_unet`` is a diffusers pipeline with a UNet of the Stable Diffusion family, or that UNet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, fingerprint, patch
from .arguments import given_words, shown
from .config import SCALINGS
from .errors import UsageError
from .hyena_file import HyenaFile, Origin, gather
from .layer_choice import choose_layers, names_of
from .targets import find_targets, select

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttachedLayer:
    """One Hyena layer of a UNet: its name and operator in words, ``full`` or ``core``, the file it was loaded from,
    whether it is switched on, and the relative error on held-out latents that training recorded. Prints as a line.
    """

    name: str
    operator: str
    form: str
    file: Path | None
    enabled: bool
    relative_error: float | None

    def __str__(self) -> str:
        error = "" if self.relative_error is None else f", held-out error {self.relative_error:.4f}"
        state = "on" if self.enabled else "off"
        return f"{self.name}: {self.operator}, {state}{error}, from {self.file or 'no file'}"


class AttachedLayers(dict[str, AttachedLayer]):
    """By name, in running order. Prints as a line a layer."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.values())) or "no Hyena layers"


def attached(pipe_or_unet: Any) -> AttachedLayers:
    """What is attached, switched on or off."""
    found = AttachedLayers()
    for name, layer in patch.attached(patch.get_unet(pipe_or_unet)).items():
        config, origin = layer.operator.config, layer.operator.origin or Origin({}, {}, {})
        error = origin.figures.get("relative_error")
        found[name] = AttachedLayer(name, config.label, config.form, origin.path, layer.enabled, error)
    return found


def load_hyena(
    pipe_or_unet: Any,
    source: Path | str | Mapping[str, Tensor],
    targets: str | Iterable[str] | None = None,
    scaling: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    subfolder: str | None = "",
    token: str | bool | None = None,
) -> list[str]:
    """Replaces self-attention layers by the operators in a Hyena file; returns the replaced layers' names.

    Args:
        source: a file written by sd-hyena, or by the 2024 original; a folder or hub id (``user/name``) that
            ``save_pretrained`` or ``push_to_hub`` wrote; or a state dict, as :func:`hyena_state_dict` returns it or
            as it is in a file.
        targets: which of the file's layers to use: names, as a comma list or any iterable, ``high`` or ``all``;
            everything the file holds unless given. A file that does not name its layer needs exactly one name.
        scaling: ``extend`` or ``stretch``, overriding how the file says its blocks grow with larger images.
        config: of a state dict: what :func:`hyena_config` returns, or a folder's config.json or a file's metadata
            says. State dicts of the 2024 program need none.
        revision, subfolder, token: of a hub id, as in huggingface_hub (a folder may have a subfolder too). Weights
            alone are fetched, never code; what is in the hub's cache is used if the hub cannot be reached.

    Either all layers are replaced or none. Loading onto a layer that already has an operator replaces that
    operator, which stays switched on or off. Other layers start switched on, but off while there are layers and all
    of them are off: what runs on attention goes on running on attention.
    Raises CheckpointError for an unusable file and UsageError if it does not fit this UNet.
    """
    if scaling not in (None, *SCALINGS):
        raise UsageError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    unet = patch.get_unet(pipe_or_unet)
    if isinstance(source, Mapping):
        if revision or subfolder:
            logger.warning("a state dict has no revision and no subfolder to choose: they are ignored")
        file = checkpoint.from_state_dict(source, config)
    elif config is not None:
        raise UsageError(f"{source}: brings its own config: config= goes with a state dict")
    else:
        file = checkpoint.load(source, revision=revision, subfolder=subfolder, token=token)
    operators, chosen = {}, choose_layers(find_targets(unet), file, targets)
    for stored, name in chosen.items():
        if scaling is not None and "scaling" not in file.layers[stored].config.entry.options:
            logger.warning("%s: layer %s has nothing that could be scaled: the scaling is ignored", file.label, name)
        operators[name] = file.build(stored, scaling)
    on = {name: layer.enabled for name, layer in patch.attached(unet).items()}
    off = [name for name in operators if not on.get(name, not on or any(on.values()))]
    if off:
        logger.warning(
            "%s: loaded switched off, as what is attached is: %s; set_hyena_enabled switches it on",
            file.label,
            ", ".join(off),
        )
    _warn_of_other_teachers(unet, file, chosen)
    patch.attach(unet, operators, off=off)
    return list(operators)


def _warn_of_other_teachers(unet: nn.Module, file: HyenaFile, chosen: Iterable[str]) -> None:
    teachers: list[dict[str, Any]] = []
    for stored in chosen:
        teacher = file.origin(stored).teacher
        if teacher in teachers:
            continue
        teachers.append(teacher)
        if further := fingerprint.difference(teacher, unet):
            logger.warning(
                "%s: was taught by another model: this UNet's self-attention weights differ, by %.3g%% in a sample",
                file.label,
                100 * further,
            )


def unload_hyena(pipe_or_unet: Any, targets: str | Iterable[str] | None = None) -> None:
    """Gives the original attention back, everywhere or at ``targets``; outputs are again bit-identical.

    Layers of this UNet that have no operator are as they should be already: doing it twice is no error. Raises
    UsageError for names that this UNet does not have.
    """
    unet = patch.get_unet(pipe_or_unet)
    patch.detach(unet, None if targets is None else names_of(find_targets(unet), given_words(targets, "targets")))


def set_hyena_enabled(pipe_or_unet: Any, enabled: bool, targets: str | Iterable[str] | None = None) -> None:
    """Switches attached layers, all or those that ``targets`` selects, between Hyena (True) and the attention they
    replaced (False).

    ``high``, ``all`` and ``IN07`` for all layers of its block mean what is attached of them. Raises UsageError if
    there is no such layer, nothing is attached there, or ``enabled`` is neither True nor False.
    """
    if not isinstance(enabled, bool):
        raise UsageError(
            f"set_hyena_enabled(pipe, enabled, targets): enabled must be True or False, got {shown(enabled)}"
        )
    unet = patch.get_unet(pipe_or_unet)
    names = None
    if targets is not None:
        words, available, there = given_words(targets, "targets"), find_targets(unet), patch.attached(unet)
        for word in words:
            if not any(target.name in there for target in select(available, word)):
                has = f"there are {', '.join(there)}" if there else "nothing is attached"
                raise UsageError(f"no Hyena layer at {word.strip()}: {has}")
        names = names_of(available, words)
    patch.set_enabled(unet, enabled, names)


def attached_file(pipe_or_unet: Any) -> HyenaFile:
    """All attached layers, switched on or off, as a file holds them. Raises UsageError if there are none."""
    layers = patch.attached(patch.get_unet(pipe_or_unet))
    if not layers:
        raise UsageError("there are no Hyena layers to save: load some first")
    operators = {name: layer.operator for name, layer in layers.items()}
    return gather(operators, {name: op.origin for name, op in operators.items() if op.origin is not None})


def hyena_state_dict(pipe_or_unet: Any) -> dict[str, Tensor]:
    """The weights of all attached layers by the names they have in a file, copies on the CPU:
    ``load_hyena(other, hyena_state_dict(pipe), config=hyena_config(pipe))``. Raises UsageError if there are none.
    """
    return checkpoint.tensors_of(attached_file(pipe_or_unet))


def hyena_config(pipe_or_unet: Any) -> dict[str, Any]:
    """What goes with :func:`hyena_state_dict`: the operators' settings, figures and training records, for JSON."""
    return checkpoint.describe(attached_file(pipe_or_unet))


def save_hyena(pipe_or_unet: Any, path: Path | str) -> None:
    """Writes all attached layers to one file, with the records of the files they came from.

    Raises UsageError if none is attached, CheckpointError if the file cannot be written.
    """
    checkpoint.write(path, attached_file(pipe_or_unet))


def list_targets(pipe_or_unet: Any) -> list[str]:
    """Names of all self-attention layers that can be replaced, in the order they run."""
    return list(find_targets(patch.get_unet(pipe_or_unet)))


def load_pipeline(
    model: Path | str, *, device: str = "cpu", dtype: torch.dtype | None = None, variant: str = ""
) -> Any:
    """A diffusers pipeline of any model that ``-m`` takes: "demo", a single file, a diffusers folder, a hub id.

    float32 unless ``dtype`` says otherwise; without a safety checker. Only hub ids need a network. Raises UsageError
    for what is no model, SdHyenaError for one that cannot be loaded.
    """
    from . import models

    return models.load_pipeline(models.locate(str(model), variant), device, dtype)


def load_operator(source: Path | str) -> nn.Module:
    """The operator of a file, folder or hub id with one layer, called as ``op(x, size=(h, w))`` on x (B, h * w, D).

    Raises UsageError if the file holds several layers or one in ``core`` form, which cannot run without
    its teacher's projections; CheckpointError if the file is unusable.
    """
    file = checkpoint.load(source)
    if len(file.layers) != 1:
        raise UsageError(f"{file.label}: holds {len(file.layers)} layers ({', '.join(file.layers)}): use load_hyena")
    (name,) = file.layers
    if file.layers[name].config.form == "core":
        raise UsageError(
            f"{file.label}: holds a core operator, which runs on its teacher's projections: use load_hyena"
        )
    return file.build(name)
