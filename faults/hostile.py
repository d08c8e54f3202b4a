"""Hostile texts, values and bytes, and ways to damage what is sound. All of it follows from a ``random.Random``."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

TEXTS = (
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "a\rb", "a\bb", "a\x00b", "\x7f", "gnp.\u202eexe", "a\u2028b",
    "\ufeffa", "a\nb", "a\tb", "", " ", "..", "../../etc/passwd", "/etc/passwd", "~", "~nobody", "%s%n",
    "{0.__class__}", "a" * 100_000, "\U0001f60a" * 300, "e\u0301" * 5000, "nan", "Infinity", "1e999", "-1", "0x10",
    "None",
    "null", "<script>alert(1)</script>", "'; DROP TABLE x; --", "$(touch x)", "CON", "[bold red]x[/]", "[/]",
    "[link=x]y",
)  # fmt: skip
# As JSON writes them, since no Python value stands for some.
VALUES = (
    "null", "true", "false", "-1", "0", "1", "2", "0.5", "-0.0", "1e308", "1e309", "-1e309", "1e-320", "NaN",
    "Infinity", "-Infinity", "9223372036854775807", "9223372036854775808", "1000000000", "1000000", "1" * 400,
    "1" * 5000, "[]", "{}", "[[]]", "[null]", "[-1]", "[0, 0]", '["x"]', '{"x": 1}', "[1, 2, 3, 4, 5, 6, 7, 8, 9]",
    '"\\ud800"',
    '"\\u0000"', "[" * 2000 + "]" * 2000, '{"x": ' * 2000 + "1" + "}" * 2000, f"[{'0, ' * 100_000}0]",
)  # fmt: skip
DEEP = 100_000  # brackets, far beyond any stack
MARK = "\x02here\x02"  # in no file of ours; a text that stands for what JSON cannot be made to write


def text(random: Random) -> str:
    """A hostile text, or one with a hostile beginning."""
    chosen = random.choice(TEXTS)
    return chosen + random.choice(TEXTS) if random.random() < 0.2 else chosen


def value(random: Random) -> str:
    """A hostile value as JSON, which may be of any type, or damaged."""
    return json.dumps(text(random)) if random.random() < 0.3 else random.choice(VALUES)


def other_formats() -> dict[str, bytes]:
    """Beginnings, or wholes, of files that stand under another's name."""
    archive, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("x", "x")
    return {
        "empty": b"",
        "five bytes": b"hello",
        "a zero": b"\0",
        "zeros": bytes(4096),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
        "HTML": b"<!DOCTYPE html><html><head><title>404</title></head><body>Not Found</body></html>",
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "JSON": b'{"error": "Repository not found"}',
        "text": b"a photograph of a cat\n" * 20,
        "Latin-1": "caf\xe9 na\xefve\n".encode("latin-1"),
        "UTF-16": "a cat".encode("utf-16"),
        "UTF-32": "a cat".encode("utf-32"),
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(64),
        "GIF": b"GIF89a\xff\xff\xff\xff\xf7" + bytes(64),
        "RIFF": b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(64),
        "PDF": b"%PDF-1.7\n" + bytes(64),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile showpage\n%%EOF\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(64),
        "RAR": b"Rar!\x1a\x07\x01\0" + bytes(64),
        "gzip": gzip.compress(bytes(1000), mtime=0),
        "tar": archive.getvalue(),
        "zip": packed.getvalue(),
        "half a zip": packed.getvalue()[:40],
        "SQLite": b"SQLite format 3\0" + bytes(64),
        "ELF": b"\x7fELF\x02\x01\x01" + bytes(64),
        "a script": b"#!/bin/sh\ntouch x\n",
        "NumPy": b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }" + bytes(64),
        "pickle": b"\x80\x04N.",
        "half a pickle": b"\x80\x04}\x94(\x8c\x01a",
        "ONNX": b"\x08\x07\x12\x07pytorch" + bytes(64),
    }


def damaged(data: bytes, random: Random) -> tuple[str, bytes]:
    """A file as bad disks, broken downloads and editors leave it, or another altogether; and what was done to it."""
    name, change = random.choice(sorted(DAMAGE.items()))
    return name, change(data, random)


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    reach = len(data) if random.random() < 0.5 else min(len(data), 600)  # headers, as often as anything else
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        if reach:
            changed[random.randrange(reach)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _piece(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 8, 512, 4096)))


def _filled(data: bytes, random: Random) -> bytes:
    start, end = _piece(data, random)
    return data[:start] + random.choice((b"\0", b"\xff", b"\x20")) * (end - start) + data[end:]


def _left_out(data: bytes, random: Random) -> bytes:
    start, end = _piece(data, random)
    return data[:start] + data[end:]


def _twice(data: bytes, random: Random) -> bytes:
    start, end = _piece(data, random)
    return data[:end] + data[start:]


def _swapped(data: bytes, random: Random) -> bytes:
    (a, b), (c, d) = sorted((_piece(data, random), _piece(data, random)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


DAMAGE: dict[str, Callable[[bytes, Random], bytes]] = {
    "bits flipped": _flip,
    "cut short": lambda data, random: data[: -random.choice((1, 2, 3, 100, len(data) // 2, len(data)))],
    "too long": lambda data, random: data + random.choice((b"\0", b"xx", bytes(4096), data)),
    "bytes overwritten": _filled,
    "bytes left out": _left_out,
    "bytes twice": _twice,
    "pieces swapped": _swapped,
    "line ends changed": lambda data, random: data.replace(b"\n", b"\r\n"),
    "another format": lambda data, random: random.choice(sorted(other_formats().values())),
    "noise": lambda data, random: random.randbytes(random.choice((8, 100, 5000))),
}


def mutated_json(content: Any, random: Random) -> tuple[str, str]:
    """A JSON document with one thing in it changed, as text; and what was done to it."""
    kind = random.choice(
        ("a value", "a value", "a value", "a key", "a key twice", "left out", "another", "deep", "swapped")
    )
    whole = json.loads(json.dumps(content))
    places = [place for place in _places(whole) if isinstance(place[0], dict)] or [({"x": whole}, "x")]
    holder, key = random.choice(places if kind in ("a key", "a key twice") else list(_places(whole)) or places)
    if kind == "left out":
        del holder[key]
    elif kind == "a key":
        holder[text(random)] = holder.pop(key)
    elif kind == "another":
        (holder.append if isinstance(holder, list) else lambda new: holder.update({text(random): new}))(MARK)
        return kind, json.dumps(whole).replace(json.dumps(MARK), value(random))
    elif kind == "swapped":
        other, beside = random.choice(list(_places(whole)) or places)
        holder[key], other[beside] = other[beside], holder[key]
        return kind, json.dumps(whole)
    elif kind == "a key twice":
        again = f"{json.dumps(holder[key])}, {json.dumps(key)}: {json.dumps(holder[key])}"
        holder[key] = MARK
        return kind, json.dumps(whole).replace(json.dumps(MARK), again, 1)
    else:
        holder[key] = MARK
        sign = random.choice(("[]", "{}"))
        nested = "[" * DEEP + "]" * DEEP if sign == "[]" else '{"a":' * DEEP + "1" + "}" * DEEP
        return kind, json.dumps(whole).replace(json.dumps(MARK), nested if kind == "deep" else value(random))
    return kind, json.dumps(whole)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) below a JSON value."""
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in ((content, key), *_places(content[key]))]


IN_PLACE = ("folder", "pipe", "link to zeros", "link to itself", "link to nothing", "socket", "full device")


def put_in_place(path: Path, kind: str) -> None:
    """Something that is no regular file, under a file's name."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                server.bind(f"/proc/self/fd/{handle}/{path.name}")  # the name of a socket must be short
            finally:
                os.close(handle)
    else:
        goals = {"link to zeros": "/dev/zero", "full device": "/dev/full", "link to nothing": "nothing-here"}
        path.symlink_to(goals.get(kind, path.name))
