"""JSON from outside, which may mean one thing only, and JSON of ours, which any reader takes.

Python's own reader keeps the last of two equal keys, takes NaN and Infinity for numbers, and text with halves of
characters, which cannot be written down again. It reads as much as there is.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

from .errors import SdHyenaError
from .finite import first_not_finite

MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 16 << 20, 64, 300  # of a document, of what is in it, of a whole number
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def load(path: Path, limit: int = MAX_BYTES) -> Any:
    """:func:`loads` of a file. Raises OSError too."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe may never end
        raise ValueError("is no file")
    with open(path, "rb") as file:
        return loads(file.read(limit + 1), limit)


def loads(text: str | bytes, limit: int = MAX_BYTES) -> Any:
    """What the JSON in ``text`` says. Raises ValueError, in one line, for a key that is there twice, numbers that are
    not finite, and text that is no JSON, too long, or nested too deep."""
    if len(text) > limit:
        raise ValueError(f"is larger than {limit >> 20} MiB")
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, object_pairs_hook=_object, **_NUMBERS)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg.partition(' (')[0]}") from None
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} deep") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        within = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [each for values in within for each in values]
    if level:
        raise ValueError(f"is nested more than {MAX_DEPTH} deep")
    return value


def dumps(value: Any, what: str, indent: int | None = None) -> str:
    """``value`` as JSON. Raises SdHyenaError, which begins with ``what``, where it holds NaN or infinity."""
    place = first_not_finite(value)
    if place:
        raise SdHyenaError(f"{what}: not written: {place} is not finite")
    return json.dumps(value, indent=indent, allow_nan=False)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


_NUMBERS: dict[str, Any] = {"parse_constant": _constant, "parse_float": _float, "parse_int": _int}
