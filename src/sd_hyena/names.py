"""File names from a user's format string, with nothing in it that can reach outside the folder."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from .errors import UsageError

_SPEC = {int: re.compile(r"0?\d{0,2}d?"), str: re.compile(r"")}


def check_format(template: str, fields: Mapping[str, type]) -> None:
    """Raises UsageError unless ``template`` is a plain file name using only ``fields`` (name -> int or str).

    Integer fields take a width such as ``{n:03d}``; conversions, attribute access and indexing are refused.
    """
    allowed = ", ".join(f"{{{name}}}" for name in fields)
    hint = f"name format {template!r}: use a plain file name with the fields {allowed}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"{hint} ({error})") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in fields:
            raise UsageError(f"{hint}; {{{name}}} is not one of them")
        if conversion or not _SPEC[fields[name]].fullmatch(spec or ""):
            raise UsageError(
                f"{hint}; {{{name}{'!' + conversion if conversion else ''}:{spec}}} is not a format it takes"
            )
    sample = template.format(**{name: 0 if kind is int else "x" for name, kind in fields.items()})
    if not template or any(c in sample for c in "/\\\0\n\r") or sample in (".", "..") or sample.startswith("-"):
        raise UsageError(f"{hint}; it must not leave the output folder")
    if len(sample.encode()) > 200:
        raise UsageError(f"{hint}; it is longer than 200 bytes")


def used_fields(template: str) -> set[str]:
    """The field names that a checked template uses."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}
