"""Dataclasses as settings: command-line flags, TOML recipes and saved metadata are views of the same fields.

Precedence: flag, then recipe, then default.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from .arguments import given_path
from .errors import UsageError
from .texts import check_text, read_text, shortened

T = TypeVar("T")
_MAX_RECIPE = 64 << 10  # bytes
# Keys of many parts are read in a time that grows with their square.
_DOTTED = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*\.[ \t]*){16}""")
# Bounds of options: far above any use, so that a slip of the finger is not hours or gigabytes.
MANY = 10_000_000  # steps of training
BATCH = 4096  # pictures at a time
SIDE = 16384  # px
STEPS = 10_000  # of diffusion
SEEDS = 2**63 - 2**20  # those after it count up


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    short: str = "",
    choices: tuple[str, ...] | None = None,
    path: bool = False,
    written: bool = False,
    folder: bool = False,
    within: tuple[float, float] | None = None,
) -> Any:
    """A dataclass field with what its command-line flag needs; ``~`` in a ``path`` is the home folder. One that is
    ``written`` may be left out, but not be given as nothing; a ``folder`` is made if there is none. A number is
    ``within`` bounds, as :func:`check_bounds` checks."""
    metadata = {"help": help, "short": short, "choices": choices, "folder": folder, "within": within}
    metadata |= {"path": path or written or folder, "written": written or folder}
    return dataclasses.field(default=default, metadata=metadata)


def add_arguments(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag per field, a command's own before those it shares with others. Flags that are not given leave no trace,
    so that a recipe can fill them."""
    for f in sorted(dataclasses.fields(settings), key=lambda field: bool(field.kw_only)):
        names = [n for n in (f.metadata["short"], f"--{f.name}") if n]
        text = f.metadata["help"]
        if f.default is not dataclasses.MISSING and f.type != "bool":
            text += f" (default: {f.default if f.default != '' else 'none'})"
        common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if f.type == "bool":
            parser.add_argument(*names, action="store_true", **common)
        else:
            kind = {"int": int, "float": float, "str": str}[str(f.type)]
            parser.add_argument(
                *names,
                type=kind,
                choices=f.metadata["choices"],
                metavar=None if f.metadata["choices"] else f.type.upper(),
                **common,
            )


def resolve(
    settings: type[T],
    flags: dict[str, Any],
    recipe: Path | str | None = None,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
) -> T:
    """The settings from given flags over a recipe's values over defaults.

    ``defaults`` may replace the fields' own defaults, knowing what was given. Raises UsageError for an
    unreadable recipe, a key that is no setting, a value of the wrong type, a number that is not finite, a path that
    cannot be, an empty name for what is written, or a required setting that neither gives.
    """
    values = ({} if recipe is None else _read_recipe(settings, given_path(recipe, "--config"))) | flags
    for f in dataclasses.fields(settings):  # type: ignore[arg-type]
        if f.metadata["path"] and f.name in values:
            if f.metadata["written"]:
                given_path(values[f.name], f"--{f.name}")
            values[f.name] = os.path.expanduser(values[f.name])
            check_path(f"--{f.name}", values[f.name], f.metadata["folder"])
        if f.type in ("int", "float") and f.name in values:
            values[f.name] = _number(f"--{f.name}", f.type, values[f.name])
    values = defaults(values) | values
    required = [f for f in dataclasses.fields(settings) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    for f in required:
        if f.name not in values:
            raise UsageError(f"{f.metadata['short']}/--{f.name} is required: {f.metadata['help']}")
    return settings(**values)


def _number(what: str, kind: str, value: Any) -> Any:
    """Raises UsageError for a number that is not finite, or beyond any that there is a use for."""
    if kind == "int" and abs(value) >= 2**64:
        raise UsageError(f"{what} is {shortened(f'{value:#x}', 40)}, but must be below 2^64")
    try:
        if kind == "int" or math.isfinite(value := float(value)):
            return value
    except OverflowError:
        value = "too large"
    raise UsageError(f"{what} is {value}, but must be a finite number")


def check_bounds(settings: Any) -> None:
    """Raises UsageError for the first number that is not within its option's bounds, or no number."""
    for f in dataclasses.fields(settings):
        if f.metadata.get("within"):
            check_number(f.name, getattr(settings, f.name), *f.metadata["within"])


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Raises UsageError for the value of an option that is not from ``least`` to ``most``."""
    if not least <= value <= most:
        shown = shortened(str(value), 40)
        raise UsageError(f"--{name} is {shown}, but must be from {least} to {most}")


def check_path(what: str, text: str, folder: bool = False) -> None:
    """Raises UsageError for a path with a name that no file can have; for a ``folder`` also if it is a file or lies
    in one."""
    path = Path(text)
    for part in (path, *path.parents):
        try:
            is_folder = stat.S_ISDIR(part.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for what is no text
            continue
        except OSError as error:
            raise UsageError(f"{what} {shortened(text)}: {error.strerror}") from None
        if folder and not is_folder:
            where = "is" if part == path else f"lies in {part}, which is"
            raise UsageError(f"{what} {shortened(text)}: {where} a file, but must be a folder")
        if folder and not os.access(part, os.W_OK | os.X_OK):
            where = "is" if part == path else f"lies in {part}, which is"
            raise UsageError(f"{what} {shortened(text)}: {where} a folder that cannot be written to")
        return


def _read_recipe(settings: type, path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):  # which reading says in a line
        if path.stat().st_size > _MAX_RECIPE:
            raise UsageError(f"recipe {path}: is larger than {_MAX_RECIPE >> 10} KiB, and no recipe")
    text = read_text(path, "recipe")
    if _DOTTED.search(text):
        raise UsageError(f"recipe {path}: cannot be read: no setting's name has so many parts")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {path}: cannot be read: {error}") from None
    except (RecursionError, ValueError):  # the latter for whole numbers of thousands of digits
        raise UsageError(f"recipe {path}: cannot be read: is nested too deep, or has a number too large") from None
    fields = {f.name: f for f in dataclasses.fields(settings)}
    for key, value in values.items():
        if key not in fields:
            raise UsageError(f"{path}: {key!r} is not a setting; there are {', '.join(fields)}")
        kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}
        kind = kinds[str(fields[key].type)]
        if not isinstance(value, kind) or (isinstance(value, bool) and fields[key].type != "bool"):
            raise UsageError(f"{path}: {key} = {shortened(repr(value))} should be of type {fields[key].type}")
        if isinstance(value, str):
            check_text(f"{path}: {key} =", value)
        choices = fields[key].metadata["choices"]
        if choices and value not in choices:
            raise UsageError(f"{path}: {key} = {shortened(repr(value))} should be one of {', '.join(choices)}")
    return values


def to_toml(settings: Any) -> str:
    """The settings as a recipe that reproduces them."""
    lines = []
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False)  # its escapes are TOML's
        else:
            text = str(value).lower() if isinstance(value, bool) else repr(value)
        lines.append(f"{f.name} = {text}")
    return "\n".join(lines)


def to_flags(settings: Any, omit: Collection[str] = (), always: Collection[str] = ()) -> str:
    """The settings that differ from their defaults as a command line would give them; never those in ``omit``,
    in any case those in ``always``."""
    words = []
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if f.name in omit or (value == f.default and f.name not in always):
            continue
        words.append(f"--{f.name}" if value is True else f"--{f.name} {shlex.quote(str(value))}")
    return " ".join(words)
