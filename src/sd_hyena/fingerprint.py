"""Whether a UNet is the one that layers were taught by.

A hash over its self-attention's weights tells models apart to the bit. A sample of these weights is compared within
the rounding of the types that both have been through: the same model in half precision or in eight bits is the same,
a fine-tune, or a model with a LoRA fused into it, is not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .nn.teacher import PROJECTIONS, projections_of
from .targets import Target, find_targets

HASH, SAMPLE = "attention_sha256", "attention_sample"  # in a teacher's record
SIZE = 64  # values in a sample
_OWN = re.compile(r"(to_[qkv]|to_out\.0)\.(weight|bias)")
_STRIDE = 2654435761  # a prime, to spread them over the rows and columns of their matrices
# Types that weights are stored in, coarsest first: a value of each has half a unit in the last place of its rounding.
_TYPES = (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)


def fingerprint(pipe: Any) -> dict[str, Any]:
    """The record of a pipeline's UNet as a teacher: see :func:`describe`."""
    unet = pipe.unet
    weights = {
        f"{target.path}.{key}": tensor
        for target in find_targets(unet).values()
        for key, tensor in _weights(unet, target).items()
    }
    return describe(type(pipe).__name__, unet, weights.__getitem__)


def describe(pipeline: str, unet: nn.Module, get: Callable[[str], Tensor]) -> dict[str, Any]:
    """The record of a teacher: its pipeline's class, its UNet's widths, and a hash over and a sample of its
    self-attention's weights.

    ``get`` is asked for each of these weights in turn, by its name in the state dict of ``unet``, which needs none.
    """
    targets = find_targets(unet).values()
    names = [f"{t.path}.{key}" for t in targets for key in _weights(unet, t)]
    matrices = [f"{t.path}.{'to_out.0' if name == 'to_out' else name}.weight" for t in targets for name in PROJECTIONS]
    digest, sample = hashlib.sha256(), [0.0] * SIZE
    for name in sorted(names):
        tensor = get(name).detach().float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(tensor.numpy())
        for number in range(SIZE):
            if name == matrices[number * len(matrices) // SIZE]:
                sample[number] = _value(tensor, number)
    config: Any = unet.config
    widths = "-".join(map(str, config.block_out_channels))
    return {"class": pipeline, "widths": widths, HASH: digest.hexdigest()[:16], SAMPLE: sample}


def exact(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a teacher's record that is another one for any other bit."""
    return {key: value for key, value in record.items() if key != SAMPLE}


def difference(record: Mapping[str, Any], unet: nn.Module) -> float:
    """How far the weights of a UNet are from a recorded teacher's: see :func:`distance`.

    0 too where that cannot be told: nothing is recorded, or weights are elsewhere (offloaded) or quantised.
    """
    return distance(record.get(SAMPLE), sample_of(unet))


def sample_of(unet: nn.Module) -> list[float] | None:
    """What :func:`describe` would sample, of replaced layers too; None if some weights cannot be read."""
    return sample_of_attentions([unet.get_submodule(t.path) for t in find_targets(unet).values()])


def sample_of_attentions(attentions: Sequence[nn.Module]) -> list[float] | None:
    """:func:`sample_of` for all self-attention of a UNet, in running order."""
    if not attentions or not all(hasattr(attention, name) for attention in attentions for name in PROJECTIONS):
        return None
    weights: list[Any] = [
        getattr(layer, "weight", None) for attention in attentions for layer in projections_of(attention)
    ]
    chosen = [weights[number * len(weights) // SIZE] for number in range(SIZE)]
    return [_value(w.detach(), number) for number, w in enumerate(chosen)] if all(map(_is_plain, chosen)) else None


def distance(first: Any, second: Any) -> float:
    """RMS of the difference of two samples over the first's; 0 if it can all be rounding, or one is no sample."""
    if not (_is_sample(first) and _is_sample(second)):
        return 0.0
    a, b = (torch.tensor(sample, dtype=torch.float32).double() for sample in (first, second))
    # Each is off by its own type's rounding; a type on the way between them, by bfloat16's at most.
    allowed = _rounding(a) + _rounding(b) + torch.maximum(a.abs(), b.abs()) * 2.0**-9
    if ((a - b).abs() <= allowed).all():
        return 0.0
    return ((a - b).square().sum() / a.square().sum().clamp_min(1e-12)).sqrt().item()


def _rounding(sample: Tensor) -> Tensor:
    """How far each value may be from what it was before it was stored, in the coarsest type that holds them all: what
    a model is loaded as says nothing about the file."""
    kind = next((t for t in _TYPES if torch.equal(sample.to(t).to(sample.dtype), sample)), torch.float32)
    info = torch.finfo(kind)
    binade = 2.0 ** sample.abs().clamp_min(info.smallest_normal).log2().floor()
    return binade * info.eps / 2


def _is_plain(weight: Any) -> bool:
    """Whether it is a matrix of numbers that are here: neither offloaded nor quantised."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    return plain and weight.dim() == 2


def _is_sample(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == SIZE
        and all(isinstance(v, int | float) and -1e30 < v < 1e30 for v in value)
    )


def _weights(unet: nn.Module, target: Target) -> dict[str, Tensor]:
    """The attention's own, of a Hyena layer too."""
    named = unet.get_submodule(target.path).named_parameters()
    found = {name.replace("base_layer.", ""): weight for name, weight in named}  # of what an adapter has wrapped
    return {name: weight for name, weight in found.items() if _OWN.fullmatch(name)}


def _value(matrix: Tensor, number: int) -> float:
    """Value ``number`` of a sample, from the matrix that it is taken from."""
    row, column = divmod(number * _STRIDE % matrix.numel(), matrix.shape[1])
    return float(f"{matrix[row, column].item():.9g}")  # float32 to the bit, and no more digits than that
