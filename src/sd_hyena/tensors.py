"""Weights by name, read when they are asked for: safetensors, torch's pickles, folders of shards.

What a file is follows from its first bytes, whatever its name ends in. Nothing in a file is ever executed.
"""

from __future__ import annotations

import re
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import strict_json
from .errors import CheckpointError
from .texts import reason

_AGAIN = "download or copy it again"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MANY_PARTS = 200_000  # in a pickle: far above any checkpoint's
_MANY = 64  # times that a pickle is tried with one more kind of object, which a trainer left beside the weights
# Files that are renamed or saved by mistake, by their first bytes.
_OTHERS = {
    b"GGUF": "a GGUF file, which is quantised",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"RIFF": "a picture",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x1f\x8b": "a gzip archive",
}
_ONNX = re.compile(rb"\x08[\x01-\x20]\x12.[\w.-]+", re.DOTALL)
# A component's weights in a folder, as diffusers and transformers name them.
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)"
    r"(?:\.(?P<variant>[\w-]+?))?"
    r"(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<old_variant>[\w-]+))?"
    r"\.(?P<kind>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)


@dataclass
class Tensors:
    """What a checkpoint holds. ``shapes`` and ``dtypes`` are known; :meth:`get` reads a tensor's data."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored. Raises CheckpointError if there is none, or it cannot be read."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: holds no tensor {name}")
        try:
            tensor = self.read(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: cannot read {name}: {reason(error)}") from None
        if tensor.is_meta:
            raise CheckpointError(f"{self.path}: {name} was saved without its values")
        return tensor


def open_tensors(path: Path | str, variant: str = "") -> Tensors:
    """The weights in a file, or in a component's folder: one file, or shards with an index. ``variant`` chooses in a
    folder; unless given, those without one are taken, or else the only ones there are.

    Raises CheckpointError, one line, for whatever is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    return _open_folder(path, variant) if path.is_dir() else _open_file(path)


def weights_in(folder: Path | str) -> dict[str, Path]:
    """The weights of a component's folder by variant, "" for those without one: an index where there are shards, else
    the file; safetensors where there are both kinds."""
    found: dict[str, list[tuple[bool, bool, Path]]] = {}
    for path in sorted(Path(folder).iterdir()):
        match = _WEIGHTS.fullmatch(path.name)
        if match and not match["shard"]:
            variant = match["variant"] or match["old_variant"] or match["index_variant"] or ""
            found.setdefault(variant, []).append((match["kind"] == "bin", not match["index"], path))
    return {variant: min(paths)[2] for variant, paths in sorted(found.items())}


def _open_folder(folder: Path, variant: str) -> Tensors:
    found = weights_in(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no weights (.safetensors or .bin)")
    if variant not in found and (variant or len(found) > 1):
        wanted = f"no weights of variant {variant}" if variant else "weights of several variants, none of them plain"
        raise CheckpointError(f"{folder}: {wanted}; there are {', '.join(name or 'plain ones' for name in found)}")
    path = found.get(variant) or next(iter(found.values()))
    return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def _open_shards(index: Path) -> Tensors:
    try:
        places = strict_json.load(index)["weight_map"]
        names = sorted(set(places.values()))
    except ValueError as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({reason(error)})") from None
    except (OSError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: not a readable index of shards: {_AGAIN}") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: names files outside of its folder")
    shards = {name: _open_file(index.parent / name) for name in names}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{index.parent / name}: lacks {tensor}, which {index.name} says it holds: {_AGAIN}")
    return Tensors(
        index,
        {tensor: shards[name].shapes[tensor] for tensor, name in places.items()},
        {tensor: shards[name].dtypes[tensor] for tensor, name in places.items()},
        lambda tensor: shards[places[tensor]].get(tensor),
        {key: value for shard in shards.values() for key, value in shard.metadata.items()},
    )


def _open_file(path: Path) -> Tensors:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path}: is empty: {_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself: fetch it with 'git lfs pull'")
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        raise CheckpointError(f"{path}: is a web page, not weights: {_AGAIN} (the link may need a login)")
    if all(byte >= 0x20 or byte in b"\t\n\r" for byte in start):
        raise CheckpointError(f"{path}: is a text file, not weights")
    if start[8:9] == b"{":  # first of all: a header's length before it may look like the start of anything else
        return _open_safetensors(path, struct.unpack("<Q", start[:8])[0], size)
    if start.startswith(b"PK\x03\x04"):
        return _open_zip(path)
    if start.startswith(b"\x80"):
        return _open_pickle(path, mmap=False)
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path}: is a tar archive, as torch before 0.4 wrote: save it again with a newer torch")
    other = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)
    if other or _ONNX.match(start):
        raise CheckpointError(f"{path}: is {other or 'an ONNX model'}, not weights of safetensors or torch")
    raise CheckpointError(f"{path}: is neither a safetensors file nor one saved by torch, or is damaged")


def _open_safetensors(path: Path, header: int, size: int) -> Tensors:
    if 8 + header > size:
        raise CheckpointError(f"{path}: is cut short or damaged: {_AGAIN}")
    try:
        _refuse_twice(path, header)
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
        metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        if "IncompleteBuffer" in str(error) or "not fully covered" in str(error):
            raise CheckpointError(f"{path}: is cut short or damaged: {_AGAIN}") from None
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason(error)})") from None
    for name, kind in kinds.items():
        if kind not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is of type {kind}, which cannot be read")
    dtypes = {name: _DTYPES[kind] for name, kind in kinds.items()}
    return Tensors(path, shapes, dtypes, file.get_tensor, metadata)


def _refuse_twice(path: Path, header: int) -> None:
    """Raises ValueError for a name that a header has twice, of which readers keep one or the other."""
    with open(path, "rb") as file:
        file.seek(8)
        strict_json.loads(file.read(min(header, strict_json.MAX_BYTES + 1)))


def _open_zip(path: Path) -> Tensors:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(f"{path}: is cut short or damaged: {_AGAIN}") from None
    names = {member.filename.rpartition("/")[2] for member in members}
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: is a zip archive, not weights: if they are in it, unpack it")
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: is a TorchScript program, not weights")
    if len({member.filename for member in members}) < len(members):
        raise CheckpointError(f"{path}: holds two parts of the same name, or is damaged: {_AGAIN}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # how much may be in there?
        raise CheckpointError(f"{path}: is compressed, as torch never writes it: {_AGAIN}")
    return _open_pickle(path, mmap=True)


def _open_pickle(path: Path, mmap: bool) -> Tensors:
    content, marks = _unpickle(path, mmap), dict[str, Tensor]()
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        beside = {name: torch.tensor(1) if value is True else value for name, value in content.items()}
        marks |= {name: value for name, value in beside.items() if isinstance(value, Tensor)}
        content = content["state_dict"]
    tensors = _by_name(path, content) if isinstance(content, Mapping | list | tuple) else {}
    if tensors:
        tensors = _by_name(path, marks) | tensors
    if not tensors:
        raise CheckpointError(f"{path}: holds no weights by name")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return Tensors(path, shapes, dtypes, tensors.__getitem__)


def _unpickle(path: Path, mmap: bool) -> Any:
    """What torch's own restricted unpickler makes of it, with inert objects for the classes that it does not know."""
    inert: dict[str, type] = {}
    tries = 0
    while True:
        tries += 1
        try:
            with torch.serialization.safe_globals(list(inert.values())), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if path.name.endswith(".safetensors"):  # torch goes by the name of a path
                    with open(path, "rb") as file:
                        return torch.load(file, map_location="cpu", weights_only=True)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # the unpickler raises what its reading of the bytes leads to
            asks_for = re.search(r"GLOBAL ([\w.]+)", str(error))
            fills = re.search(r"Can only (\w+) .*but got <class '([\w.]+)'>", str(error))
            if fills and fills[2] in inert and tries < _MANY:  # a kind of mapping or list: plain ones are made instead
                module, _, attribute = fills[2].rpartition(".")
                inert[fills[2]] = _inert(module, attribute, OrderedDict if "SETITEM" in fills[1] else list)
                continue
            if asks_for is None:
                raise CheckpointError(f"{path}: not a readable torch file, or damaged: {_AGAIN}") from None
            name = asks_for[1]
            if name in inert or tries >= _MANY or not _is_extra(name):
                raise CheckpointError(
                    f"{path}: asks to run code of its own ({name}), which is never done: save its weights alone, as "
                    ".safetensors"
                ) from None
            module, _, attribute = name.rpartition(".")
            inert[name] = _inert(module or "builtins", attribute)


def _is_extra(name: str) -> bool:
    """Whether a trainer may have left it: no function of Python's own, nor what torch should know how to read."""
    module, _, attribute = name.rpartition(".")
    module = module or "builtins"  # which torch leaves out
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return isinstance(getattr(sys.modules.get(module), attribute, None), type)
    return root != "torch"


def _by_name(path: Path, content: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for count, (name, value) in enumerate(_flatten(content)):
        if count >= _MANY_PARTS:  # lists may hold each other many times over
            raise CheckpointError(f"{path}: holds more than {_MANY_PARTS} parts, which no checkpoint does")
        if value is not None and name in tensors:
            raise CheckpointError(f"{path}: holds two tensors of the name {name}")
        if value is not None:
            tensors[name] = value
    return tensors


def _flatten(content: Any, prefix: str = "", depth: int = 3) -> Iterator[tuple[str, Tensor | None]]:
    """All parts by name, with None for what is no tensor."""
    for name, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, Mapping | list | tuple) and depth:
            yield from _flatten(value, f"{prefix}{name}.", depth - 1)
        else:
            yield f"{prefix}{name}", None


def _inert(module: str, name: str, made: type = object) -> type:
    """A class that passes for another by its name, takes any arguments, and does nothing: calls make plain objects, or
    empty ones of ``made``."""

    def new(cls: type, *args: Any) -> Any:
        return object.__new__(cls) if made is object else made()

    does_nothing = {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None}
    return type(name, (), {"__module__": module, "__new__": new} | does_nothing)
