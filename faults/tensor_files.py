"""safetensors files taken apart and put together wrongly."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from . import hostile

BITS = {  # of one value that is not finite, by type
    "F16": (b"\x00\x7e", b"\x00\x7c"),
    "BF16": (b"\xc0\x7f", b"\x80\x7f"),
    "F32": (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"),
    "F64": (b"\0\0\0\0\0\0\xf8\x7f", b"\0\0\0\0\0\0\xf0\x7f"),
}
Header = dict[str, Any]


def taken_apart(data: bytes) -> tuple[Header, bytes]:
    """The header and the tensors' bytes of a sound file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Header | str, tensors: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def mutated(data: bytes, random: Random) -> tuple[str, bytes, bool]:
    """A file with one thing wrong, what that is, and whether a reader must refuse it whatever it is for."""
    header, tensors = taken_apart(data)
    possible = {
        name: change for name, change in CHANGES.items() if name != "a value beyond float32" or _singles(header)
    }
    name, (change, refused) = random.choice(sorted(possible.items()))
    return name, change(header, tensors, random), refused


def _names(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _singles(header: Header) -> list[str]:
    return [name for name in _names(header) if header[name]["dtype"] == "F32"]


def _renamed(header: Header, tensors: bytes, random: Random) -> bytes:
    name = random.choice(_names(header))
    new = random.choice((hostile.text(random), name + "x", name[:-1], name.upper(), f"x.{name}"))
    header[new if new not in header else name + ".x"] = header.pop(name)
    return put_together(header, tensors)


def _named_twice(header: Header, tensors: bytes, random: Random) -> bytes:
    name = random.choice(_names(header))
    text = json.dumps(header)
    entry = f"{json.dumps(name)}: {json.dumps(header[name])}"
    return put_together(text.replace(entry, f"{entry}, {entry}"), tensors)


def _metadata_twice(header: Header, tensors: bytes, random: Random) -> bytes:
    """One of its keys, or of the keys of the JSON within it."""
    metadata = header["__metadata__"]
    key = random.choice(sorted(metadata))
    inner = metadata[key]
    if inner.startswith('{"') and random.random() < 0.7:
        first = inner[1 : inner.index(":")]
        metadata[key] = f"{{{first}: {{}}, {inner[1:]}"
        return put_together(header, tensors)
    entry = f"{json.dumps(key)}: {json.dumps(inner)}"
    return put_together(json.dumps(header).replace(entry, f"{entry}, {entry}"), tensors)


def _retyped(header: Header, tensors: bytes, random: Random) -> bytes:
    entry = header[random.choice(_names(header))]
    kinds = ["F64", "F16", "BF16", "I8", "U64", "I32", "BOOL", "F8_E5M2", "F4", "C64", "f32", "X", 32, None]
    entry["dtype"] = random.choice([kind for kind in kinds if kind != entry["dtype"]])
    return put_together(header, tensors)


def _reshaped(header: Header, tensors: bytes, random: Random) -> bytes:
    entry = header[random.choice(_names(header))]
    shape = entry["shape"]
    shapes = [
        [*shape[::-1], 2],
        [],
        [0],
        [1] * 70,
        [-1],
        [1 << 62, 4],
        [1 << 32, 1 << 32],
        [*shape, 0],
        [1.5],
        "x",
        None,
    ]
    entry["shape"] = random.choice(shapes)
    return put_together(header, tensors)


def _moved(header: Header, tensors: bytes, random: Random) -> bytes:
    entry = header[random.choice(_names(header))]
    start, end = entry["data_offsets"]
    big = 1 << 62
    ways = [
        [end, start],
        [start, end + 8],
        [start + 8, end + 8],
        [-8, end],
        [big, big + end - start],
        [0, 0],
        [start],
        None,
    ]
    entry["data_offsets"] = random.choice([way for way in ways if way != entry["data_offsets"]])
    return put_together(header, tensors)


def _length(header: Header, tensors: bytes, random: Random) -> bytes:
    length = len(json.dumps(header))
    lengths = (0, 1, length - 1, length + 1, length + 8, 100_000_001, 1 << 31, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
    return put_together(header, tensors, random.choice(lengths))


def _not_finite(header: Header, tensors: bytes, random: Random) -> bytes:
    name = random.choice([name for name in _names(header) if header[name]["dtype"] in BITS])
    start, end = header[name]["data_offsets"]
    bits = random.choice(BITS[header[name]["dtype"]])
    place = start + len(bits) * random.randrange((end - start) // len(bits))
    return put_together(header, tensors[:place] + bits + tensors[place + len(bits) :])


def _beyond_float32(header: Header, tensors: bytes, random: Random) -> bytes:
    """A tensor of float64 with a value that is finite there alone."""
    name = random.choice(_singles(header))
    count = (header[name]["data_offsets"][1] - header[name]["data_offsets"][0]) // 4
    header[name] = {
        "dtype": "F64", "shape": header[name]["shape"], "data_offsets": [0, 8 * count],
    }  # fmt: skip
    blob, end = struct.pack("<d", 1e300) * count, 8 * count
    kept, _ = tensors, None
    for other in _names(header):
        if other != name:
            start, stop = header[other]["data_offsets"]
            header[other]["data_offsets"] = [end, end + stop - start]
            blob, end = blob + kept[start:stop], end + stop - start
    return put_together(header, blob)


def _metadata(header: Header, tensors: bytes, random: Random) -> bytes:
    """Hostile metadata, as the text that it must be."""
    metadata = header.setdefault("__metadata__", {})
    if metadata and random.random() < 0.5:
        metadata[random.choice(sorted(metadata))] = hostile.text(random)
    else:
        metadata[hostile.text(random)] = hostile.text(random)
    return put_together(header, tensors)


def _metadata_of_other_types(header: Header, tensors: bytes, random: Random) -> bytes:
    return put_together(
        header | {"__metadata__": random.choice((7, [], "x", {"format": 1}, {"format": {"a": "b"}}))}, tensors
    )


def _within(header: Header, tensors: bytes, random: Random) -> bytes:
    """One value of the JSON that the metadata hold."""
    metadata = header.get("__metadata__", {})
    sections = sorted(key for key, text in metadata.items() if text.startswith("{"))
    if not sections:
        return _metadata(header, tensors, random)
    section = sections[0] if random.random() < 0.8 else random.choice(sections)
    metadata[section] = hostile.mutated_json(json.loads(metadata[section]), random)[1]
    return put_together(header, tensors)


def _header(header: Header, tensors: bytes, random: Random) -> bytes:
    return put_together(hostile.mutated_json(header, random)[1], tensors)


# What is done to a file, and whether any reader must refuse the result.
CHANGES: dict[str, tuple[Callable[[Header, bytes, Random], bytes], bool]] = {
    "a tensor renamed": (_renamed, True),
    "a tensor named twice": (_named_twice, True),
    "a key of the metadata twice": (_metadata_twice, True),
    "a tensor retyped": (_retyped, True),
    "a tensor reshaped": (_reshaped, True),
    "a tensor moved": (_moved, True),
    "another header length": (_length, True),
    "a value not finite": (_not_finite, True),
    "a value beyond float32": (_beyond_float32, True),
    "hostile metadata": (_metadata, False),
    "metadata of other types": (_metadata_of_other_types, True),
    "hostile JSON in the metadata": (_within, False),
    "hostile JSON in the header": (_header, False),
}
