"""Files of the 2024 sd-hyena: one causal layer, string metadata, no hyper-parameters.

Order, filter order and short filter order follow from tensor shapes; the number of blocks left no trace
and is taken as 1, the original's default. The sine module that the filter shares was saved once; its two
aliases are put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError
from .hyena_file import HyenaFile, LayerInfo
from .nn import OperatorConfig
from .targets import NAME

_FREQ = "filter_fn.implicit_filter.{}.freq"
_MARKS = (
    "in_proj.weight",
    "out_proj.weight",
    "short_filter.weight",
    "filter_fn.implicit_filter.0.weight",
    "filter_fn.pos_emb.z",
)


def parse(path: Path | str, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> HyenaFile:
    """A :class:`HyenaFile` with one layer. Raises CheckpointError if the tensors are not such a layer's."""
    missing = [key for key in _MARKS if key not in tensors]
    if missing:
        raise CheckpointError(f"{path}: holds no Hyena layer (no {missing[0]} and no sd-hyena metadata)")
    ranks = {
        "in_proj.weight": 2,
        "short_filter.weight": 3,
        "filter_fn.implicit_filter.0.weight": 2,
        "filter_fn.pos_emb.z": 3,
    }
    for key, rank in ranks.items():
        if tensors[key].dim() != rank:
            raise CheckpointError(f"{path}: {key} has {tensors[key].dim()} dimensions, expected {rank}")
    projected, dim = tensors["in_proj.weight"].shape
    if dim == 0 or projected % dim:
        raise CheckpointError(f"{path}: in_proj.weight maps {dim} channels to {projected}, expected a multiple")
    length = tensors["filter_fn.pos_emb.z"].shape[1]
    height, width = _grid(metadata, length)
    try:
        config = OperatorConfig(
            dim=dim,
            height=height,
            width=width,
            operator="causal",
            hyena_order=projected // dim - 1,
            hyena_filter_order=tensors["filter_fn.implicit_filter.0.weight"].shape[0],
            hyena_short_filter_order=tensors["short_filter.weight"].shape[2],
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    shared = tensors.get(_FREQ.format(1))
    if shared is not None:
        tensors = tensors | {_FREQ.format(i): shared for i in (3, 5) if _FREQ.format(i) not in tensors}
    target = metadata.get("target", "").strip().upper()
    name = target if NAME.fullmatch(target) else ""
    training: dict[str, Any] = {"format": "sd-hyena 2024"} | {
        k: v for k, v in metadata.items() if not k.startswith("filter_fn.")
    }
    return HyenaFile({name: LayerInfo(config)}, {name: tensors}, training=training, version=0)


def _grid(metadata: Mapping[str, str], length: int) -> tuple[int, int]:
    """(h, w) in latent cells from the metadata if it agrees with the tensors, else length x 1."""
    values = [metadata.get(key, "") for key in ("train_height", "train_width")]
    if all(v.isdecimal() and len(v) < 6 for v in values):
        h, w = map(int, values)
        if h * w == length:
            return h, w
    return length, 1
