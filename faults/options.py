"""Hostile values of every option of every command."""

from __future__ import annotations

import contextlib
import importlib
from random import Random
from typing import Any

from . import child, hostile
from .judge import files_in
from .report import Report
from .scene import COMMANDS, Scene

COUNT = 200
LIMIT = 4.0  # seconds until a model would be read
NUMBERS = (
    "-1",
    "0",
    "1",
    "-8",
    "7",
    "100000000",
    "1000000000",
    "2147483648",
    "9223372036854775808",
    "1" * 400,
    "1" * 5000,
)
FLOATS = ("nan", "inf", "-inf", "-1", "0", "1e38", "1e308", "1e-320", "1e999", "-0.0")
WORDS = (
    *("meta", "cuda:99", "fp16", "0x0", "64x", "64x64,64x64", "1e9x1e9", "64x64x64", "99999999x8", "IN99", "IN01,IN01"),
    *(",", "+", "a+", "/dev/null", "/proc/self/mem", "/dev/zero", ".", "../..", "~", "~nobody/x", "-", "--", "demo"),
)
# Formats of names that no run may take (point 16).
FORMATS = (
    *("../x", "/tmp/x", "a/b", "a\\..\\b", "x\x00y", "{n.__class__}", "{n!r:>9}", "{n:>999999999}", "{n:999999999}"),
    *("{x}", "{}", "{0}", "{n", "n}", "n" * 300, "", ".", "..", "same", "{n[0]}", "{n:{n}}", "{n:x>99999999d}"),
    "\x1b[31m{n}",
)
# What must be refused before a model is read: command, option, value.
REFUSED = [
    *[("generate", flag, value) for flag in ("-W", "-H") for value in ("0", "-8", "63", "1000000000", "1" * 400)],
    *[("train", flag, value) for flag in ("-W", "-H", "-b", "-n") for value in ("-1", "1" * 400)],
    *[
        (each, "--device", value)
        for each in ("train", "generate", "prepare", "evaluate")
        for value in ("meta", "cuda:99", "x")
    ],
    ("train", "--mixed_precision", "fp16"),
    *[("generate", "-n", "100000000"), ("generate", "-i", "1000000000"), ("prepare", "-b", "100000000")],
    *[("train", "-b", "100000000"), ("train", "--n_images", "1000000000"), ("prepare", "-n", "1000000000")],
    *[("train", "-t", "IN01,IN01"), ("generate", "-t", "IN99"), ("evaluate", "-n", "1000000000")],
    *[(each, "-m", "not-there") for each in ("train", "generate", "prepare", "evaluate", "anatomy", "benchmark image")],
    *[("generate", "-f", each) for each in FORMATS],
    *[("train", "-f", each.replace("{n", "{s")) for each in FORMATS if each != "same"],
]


def run(report: Report, scale: float, seed: int) -> None:
    flags = {name: flags_of(line) for name, line in COMMANDS.items()}
    with Scene() as scene:
        fixed = int(len(REFUSED) * min(1, scale) + 0.5)
        for number in report.numbers((COUNT + len(REFUSED)) * scale):
            random = report.random(number)
            if number < fixed:
                name, flag, value = REFUSED[number % len(REFUSED)] if scale >= 1 else random.choice(REFUSED)
                refused, points = True, (16, 17) if flag == "-f" else (17,)
            else:
                name = random.choice(sorted(flags))
                flag, kind = random.choice(flags[name])
                value = _value(kind, random)
                refused, points = value == "nan" and kind is float, (17,)
            folder = scene.folder()
            before = files_in(folder)
            more = ["-n", "2"] if (flag, value) == ("-f", "same") else []
            words = [*scene.words(name), *more]
            argv = [*words, f"{flag}={value}" if flag.startswith("--") else f"{flag}{value}" if value else flag]
            argv += [] if value or flag.startswith("--") else [""]
            loads = not name.startswith(("benchmark layer", "benchmark sizes", "convert", "merge"))
            ending = child.call(child.command(argv, load=not loads), LIMIT, cwd=folder)
            writes = ["logs*", "out", "out/*"] if not loads else ["logs*"]
            wrong = child.judged(
                ending, limit=LIMIT, refused=refused, files_before=before, files_after=files_in(folder), writes=writes
            )
            wrong = wrong and f"{name} {flag} {value[:40]}: {wrong}"
            report.verdict(points, f"options: {name}", wrong, report.again(number))


def flags_of(line: str) -> list[tuple[str, Any]]:
    """Each option of a command that takes a value, and the type of it."""
    from sd_hyena.cli.parser import Parser

    found: dict[str, Any] = {}
    command, what = [*line.split(), ""][:2]
    parser = Parser(prog="x")
    importlib.import_module(f"sd_hyena.cli.{command}").add_arguments(parser)
    for action in list(parser._actions):
        choices: Any = action.choices
        with contextlib.suppress(AttributeError, TypeError, KeyError):
            for sub in choices[what]._actions:
                found |= {flag: sub.type or str for flag in sub.option_strings[:1] if sub.nargs is None}
        if action.nargs is None and action.option_strings:
            found[action.option_strings[-1]] = action.type or str
    return sorted(found.items())


def _value(kind: Any, random: Random) -> str:
    if random.random() < 0.15:
        return hostile.text(random).replace("\0", "")[:1000].encode("utf-8", "ignore").decode()
    return random.choice({int: NUMBERS, float: FLOATS}.get(kind, WORDS))
