"""A folder of prepared data: ``manifest.json``, and shards of latents and prompt embeddings.

A shard is a safetensors file of pictures of one size:

- ``latents`` (n, C, h, w), float32, scaled as the UNet takes them;
- ``states`` (p, tokens, D), the text encoder's states of p prompts, each once; row 0 is the empty prompt;
- ``pooled`` (p, E), for models that take pooled states too (SDXL);
- ``prompt`` (n,), int64: which row each picture belongs to.

Its metadata hold the p ``prompts``. The manifest says what determines the contents (``identity``), how many
shards make the folder complete, and for each finished one its file, SHA-256, picture size in px, number of
pictures, and which of them are held out; also a sample of the teacher's weights (``teacher_sample``). Nothing in
either depends on when or in how many runs it was made.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from ..errors import SdHyenaError, UsageError
from ..files import atomic_path
from ..texts import reason

FORMAT, VERSION = "sd-hyena-data", 1
MANIFEST, SHARDS = "manifest.json", "shards"


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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the folder's manifest atomically. Raises SdHyenaError if it cannot be written."""
    document = {"format": FORMAT, "version": VERSION} | asdict(manifest)
    try:
        with atomic_path(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SdHyenaError(f"{folder / MANIFEST}: cannot write: {error.strerror or error}") from None


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if it has none. Raises SdHyenaError for one that is not ours, or damaged."""
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SdHyenaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SdHyenaError(f"{path}: not the manifest of a prepared folder: choose another folder")
    if document.get("version") != VERSION:
        raise SdHyenaError(f"{path}: version {document.get('version')!r}, but this sd-hyena reads {VERSION}")
    try:
        shards = [Shard(**(entry | {"size": tuple(entry["size"])})) for entry in document["shards"]]
        manifest = Manifest(document["identity"], int(document["n_shards"]), shards, document.get("teacher_sample", []))
        names = [shard_name(number) for number in range(len(shards))]
        fits = names == [s.file for s in shards] and len(shards) <= manifest.n_shards
        if not fits or not {s.size for s in shards} <= set(manifest.sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise SdHyenaError(f"{path}: damaged: remove it and run prepare again") from None
    return manifest


def finished_manifest(folder: Path) -> Manifest:
    """The manifest of a folder to train on. Raises UsageError if there is none, SdHyenaError if it is unfinished."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            f"data folder {folder}: no {MANIFEST} there: sd-hyena prepare -o {shlex.quote(str(folder))} makes one"
        )
    if len(manifest.shards) < manifest.n_shards:
        done = f"{len(manifest.shards)} of {manifest.n_shards} shards"
        raise SdHyenaError(f"data folder {folder}: holds {done}: run prepare again to finish it")
    return manifest


def write_shard(
    folder: Path,
    number: int,
    size: tuple[int, int],
    tensors: Mapping[str, Tensor],
    prompts: Sequence[str],
    held_out: Sequence[int],
) -> Shard:
    """Writes a shard atomically; returns its entry. Raises SdHyenaError if it cannot be written."""
    # One metadata entry: safetensors writes several in any order, and a shard made twice must be the same.
    data = serialise({k: v.contiguous() for k, v in tensors.items()}, {"prompts": json.dumps(list(prompts))})
    path = folder / shard_name(number)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise SdHyenaError(f"{path}: cannot write: {error.strerror or error}") from None
    checksum = hashlib.sha256(data).hexdigest()
    return Shard(shard_name(number), checksum, size, len(tensors["latents"]), list(held_out))


def damage(folder: Path, shard: Shard) -> str:
    """What is wrong with a shard's file, or "" if it is as it was written."""
    try:
        with open(folder / shard.file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest == shard.sha256 else "its checksum is wrong"


def read_shard(folder: Path, shard: Shard, check: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """A shard's tensors, paged in from the file as they are used, and the prompts of its states' rows.

    ``check`` compares its checksum first. Raises SdHyenaError.
    """
    path = folder / shard.file
    wrong = damage(folder, shard) if check else ""
    if not wrong:
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                prompts = json.loads((file.metadata() or {})["prompts"])
            if len(tensors["latents"]) == len(tensors["prompt"]) == shard.items and "states" in tensors:
                return tensors, prompts
            wrong = "its contents are not those of a shard"
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            wrong = f"cannot be read ({reason(error)})"
    raise SdHyenaError(f"{path}: {wrong}: run prepare again to make it anew")
