"""A folder of prepared data: ``manifest.json``, and shards of latents and prompt embeddings.

A shard is a safetensors file of pictures of one size:

- ``latents`` (n, C, h, w), float32, scaled as the UNet takes them;
- ``states`` (p, tokens, D), the text encoder's states of p prompts, each once; row 0 is the empty prompt;
- ``pooled`` (p, E), for models that take pooled states too (SDXL);
- ``prompt`` (n,), int64: which row each picture belongs to.

Its metadata hold the p ``prompts``. The manifest says what determines the contents (``identity``), how many
shards make the folder complete, and for each finished one its file, SHA-256, picture size in px, number of
pictures, and which of them are held out; also a sample of the teacher's weights (``teacher_sample``). Nothing in
either depends on when or in how many runs it was made. :mod:`.manifest` says what can be in them.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save as serialise
from torch import Tensor

from .. import strict_json
from ..errors import CheckpointError, SdHyenaError, UsageError
from ..files import write_file
from ..finite import NOT_FINITE, first_not_finite
from ..tensors import open_tensors
from .manifest import Manifest, Shard, check_contents, manifest_of, shard_name

FORMAT, VERSION = "sd-hyena-data", 1
MANIFEST = "manifest.json"
LARGEST = 1 << 28  # bytes of a manifest: a million shards


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the folder's manifest atomically. Raises SdHyenaError if it cannot be written."""
    document = {"format": FORMAT, "version": VERSION} | asdict(manifest)
    write_file(folder / MANIFEST, strict_json.dumps(document, str(folder / MANIFEST), 1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if it has none. Raises SdHyenaError for one that is not ours, or damaged."""
    path = folder / MANIFEST
    try:
        document = strict_json.load(path, LARGEST)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SdHyenaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SdHyenaError(f"{path}: not the manifest of a prepared folder: choose another folder")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise SdHyenaError(f"{path}: version {document.get('version')!r}, but this sd-hyena reads {VERSION}")
    try:
        return manifest_of(document)
    except ValueError as error:
        raise SdHyenaError(f"{path}: damaged ({error}): remove it and run prepare again") from None


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
    path = folder / shard_name(number)
    if name := first_not_finite(tensors):
        raise SdHyenaError(f"{path}: not written: {name} {NOT_FINITE}")
    data = serialise({k: v.contiguous() for k, v in tensors.items()}, {"prompts": json.dumps(list(prompts))})
    write_file(path, data)
    checksum = hashlib.sha256(data).hexdigest()
    return Shard(shard_name(number), checksum, size, len(tensors["latents"]), list(held_out))


def damage(folder: Path, shard: Shard) -> str:
    """What is wrong with a shard's file, or "" if it is as it was written."""
    try:
        if not (folder / shard.file).is_file() and (folder / shard.file).exists():
            return "is no file"  # a pipe may never end
        with open(folder / shard.file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest == shard.sha256 else "its checksum is wrong"


def read_shard(folder: Path, shard: Shard, check: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """A shard's tensors, paged in from the file as they are used, and the prompts of its states' rows.

    ``check`` compares its checksum first, and looks at every number. Raises SdHyenaError.
    """
    path = folder / shard.file
    wrong = damage(folder, shard) if check else ""
    if not wrong:
        try:
            held = open_tensors(path)
            tensors = {name: held.get(name) for name in held}
            prompts = strict_json.loads(held.metadata.get("prompts", ""))
            check_contents(shard.items, shard.size, tensors, prompts)
            if name := first_not_finite(tensors if check else {}):
                raise ValueError(f"{name} {NOT_FINITE}")
            return tensors, prompts
        except CheckpointError as error:
            raise SdHyenaError(f"{error}: run prepare again to make it anew") from None
        except ValueError as error:
            wrong = f"its contents are not those of a shard ({error})"
    raise SdHyenaError(f"{path}: {wrong}: run prepare again to make it anew")
