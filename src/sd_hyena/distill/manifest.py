"""What a prepared folder says it holds, and whether that, and what is in its shards, can be."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

SHARDS = "shards"
MAX_SHARDS, MAX_SIDE = 1 << 20, 1 << 16
_MANIFEST = {"format": str, "version": int, "identity": dict, "n_shards": int, "shards": list}
_IDENTITY: dict[str, type] = {"kind": str, "teacher": dict, "weights": str, "dtype": str, "sizes": list}
_IDENTITY |= {"prompts_sha256": str, "n_images": int, "n_held_out": int, "seed": int}
_OF_KIND: dict[str, dict[str, type]] = {
    "drawn": {"draw_steps": int, "guidance": float, "unconditional": float, "scheduler": str, "scheduler_sha256": str},
    "images": {"images_sha256": str},
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shard:
    """One finished shard: ``size`` is (width, height) in px, ``held_out`` numbers rows of the file."""

    file: str
    sha256: str
    size: tuple[int, int]
    items: int
    held_out: list[int]


@dataclass
class Manifest:
    """What a folder holds, or is to hold."""

    identity: dict[str, Any]
    n_shards: int
    shards: list[Shard] = field(default_factory=list)
    teacher_sample: list[float] = field(default_factory=list)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) in px, in the order in which they were asked for."""
        return [(w, h) for w, h in self.identity["sizes"]]

    @property
    def key(self) -> str:
        """A name for the contents."""
        return identity_key(self.identity)


def identity_key(identity: Mapping[str, Any]) -> str:
    """Twenty hexadecimal digits that stand for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def shard_name(number: int) -> str:
    """A shard's path inside its folder."""
    return f"{SHARDS}/{number:05d}.safetensors"


def manifest_of(document: Mapping[str, Any]) -> Manifest:
    """The manifest that a document is. Raises ValueError, saying what of it cannot be."""
    _check_fields("it", document, _MANIFEST, {"teacher_sample": list})
    identity, n_shards, sample = document["identity"], document["n_shards"], document.get("teacher_sample", [])
    kind = str(identity.get("kind"))
    if kind not in _OF_KIND:
        raise ValueError(f"identity.kind is none of {', '.join(_OF_KIND)}")
    _check_fields("identity", identity, _IDENTITY | _OF_KIND[kind])
    if not all(isinstance(value, str) for value in identity["teacher"].values()):
        raise ValueError("identity.teacher holds what is no text")
    if not identity["sizes"] or not all(map(_is_size, identity["sizes"])):
        raise ValueError("identity.sizes are not widths and heights")
    if _repeats(sorted(identity["sizes"])):
        raise ValueError("identity.sizes has one twice")
    if any(type(value) not in (int, float) for value in sample):
        raise ValueError("teacher_sample holds what is no number")
    if not 1 <= n_shards <= MAX_SHARDS or len(document["shards"]) > n_shards:
        raise ValueError(f"{len(document['shards'])} shards of {n_shards} cannot be")
    shards = [_shard_of(number, entry, identity["sizes"]) for number, entry in enumerate(document["shards"])]
    items, held_out = sum(shard.items for shard in shards), sum(len(shard.held_out) for shard in shards)
    if items - held_out > identity["n_images"] or held_out > identity["n_held_out"]:
        raise ValueError("its shards hold more pictures than it says")
    few = held_out < identity["n_held_out"] or items - held_out < (identity["n_images"] if kind == "drawn" else 1)
    if len(shards) == n_shards and few:
        raise ValueError("its shards hold fewer pictures than it says")
    return Manifest(identity, n_shards, shards, sample)


def _shard_of(number: int, entry: Any, sizes: list[list[int]]) -> Shard:
    where = f"shard {number}"
    _check_fields(where, entry, {"file": str, "sha256": str, "size": list, "items": int, "held_out": list})
    if entry["file"] != shard_name(number) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise ValueError(f"{where}: its file or checksum is none")
    if entry["size"] not in sizes or entry["items"] < 1:
        raise ValueError(f"{where}: size {entry['size']}, {entry['items']} pictures cannot be")
    held_out = entry["held_out"]
    if any(type(row) is not int or not 0 <= row < entry["items"] for row in held_out) or _repeats(held_out):
        raise ValueError(f"{where}: held_out are not rows of it, in order")
    return Shard(**entry | {"size": tuple(entry["size"])})


def check_contents(items: int, size: tuple[int, int], tensors: Mapping[str, Tensor], prompts: Any) -> None:
    """Raises ValueError, saying what is wrong with a shard's tensors or prompts."""
    if not {"latents", "prompt", "states"} <= tensors.keys() <= {"latents", "prompt", "states", "pooled"}:
        raise ValueError(f"its tensors are {', '.join(sorted(tensors)[:5])}")
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts) or prompts[:1] != [""]:
        raise ValueError("its prompts are not a list of texts that begins with the empty one")
    of_prompts = len(prompts), _FLOATS
    kinds: dict[str, tuple[int, int, tuple[torch.dtype, ...]]] = {
        "latents": (4, items, (torch.float32,)),
        "prompt": (1, items, (torch.int64,)),
        "states": (3, *of_prompts),
        "pooled": (2, *of_prompts),
    }
    for name, tensor in tensors.items():
        dimensions, rows, types = kinds[name]
        if tensor.dim() != dimensions or len(tensor) != rows or not tensor.numel() or tensor.dtype not in types:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}")
    (width, height), (h, w) = size, tensors["latents"].shape[-2:]
    if (height // h, height % h) != (width // w, width % w) or height % h:
        raise ValueError(f"latents of {h} x {w} cells are not of {width}x{height} px")
    if not 0 <= int(tensors["prompt"].min()) <= int(tensors["prompt"].max()) < len(prompts):
        raise ValueError("prompt names rows that states has not")


def _check_fields(
    what: str, found: Any, kinds: Mapping[str, type], may_lack: Mapping[str, type] = MappingProxyType({})
) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    known = {**kinds, **may_lack}
    for problem, names in (("lacks", kinds.keys() - found.keys()), ("has an unknown", found.keys() - known.keys())):
        if names:
            raise ValueError(f"{what} {problem} {min(names)!r}")
    for name, value in found.items():
        kind = known[name]
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"{what}: {name} is of type {type(value).__name__}, not {kind.__name__}")
        if kind in (int, float) and value < 0:
            raise ValueError(f"{what}: {name} is {value}")


def _repeats(ordered: list[Any]) -> bool:
    """Whether it does, or is in another order."""
    return any(not a < b for a, b in itertools.pairwise(ordered))


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= MAX_SIDE for n in size)
