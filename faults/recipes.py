"""Mutated recipes and lists of prompts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from random import Random

from . import child, hostile
from .report import Report

RECIPES, PROMPTS = 300, 100
LIMIT = 5.0  # seconds for one file
TOML = (  # values that JSON has not
    "nan", "inf", "-inf", "+inf", "1_000_000", "0xffffffffffffffffff", "1e400", "1979-05-27T07:32:00Z", "07:32:00",
    '"""\nx\n"""', "'''x'''", "{x = 1}", "{x = {y = 2}}", "[{x = 1}]", "truE", "=", "", '"', "'", '"\\u001b[31m"',
    '"\\u0000"', '"\\U0010ffff"', '"\\ud800"', "99999999999999999999", "1" * 5000, "-0", "+1",
)  # fmt: skip
BREAKING = ("\x00", "\x1b[31m", "\x7f", "\x9b", "\ud800")  # characters that no text may have


def run(report: Report, scale: float, seed: int) -> None:
    from sd_hyena.distill.settings import TrainSettings
    from sd_hyena.settings import to_toml

    sound = to_toml(TrainSettings(teacher_model="demo"))
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folder = Path(place)
        recipes = int(RECIPES * scale)
        for number in report.numbers((RECIPES + PROMPTS) * scale):
            random = report.random(number)
            is_recipe = number < recipes
            path = folder / ("x.toml" if is_recipe else "x.txt")
            what, refused, keys = (_recipe if is_recipe else _prompts)(path, sound, random)
            if is_recipe:
                argv = ["train", "--config", str(path), "-o", str(folder / "out"), "-l", str(folder / "log")]
                argv += ["--print_config"] if random.random() < 0.5 else []
            else:
                argv = random.choice((["prepare"], ["train"], ["evaluate", "-y", "demo"], ["anatomy"]))
                argv = [*argv, "-m", "demo", "-o", str(folder / "out"), "--prompts", str(path)]
            ending = child.call(child.command(argv, load=False), LIMIT)
            wrong = child.judged(ending, limit=LIMIT, names=[path.name, *keys], refused=refused)
            report.verdict((1, 2, 16, 17) if is_recipe else (1,), what, wrong, report.again(number))
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def _recipe(path: Path, sound: str, random: Random) -> tuple[str, bool, list[str]]:
    """Writes a recipe; what was done to it, whether it must be refused, and what a refusal may name beside it."""
    lines = sound.splitlines()
    chosen = random.randrange(len(lines))
    key, _, old = lines[chosen].partition(" = ")
    kind = random.choice(("value", "value", "value", "key", "twice", "nested", "table", "bytes", "bytes", "place"))
    if kind == "place":
        hostile.put_in_place(path, random.choice(hostile.IN_PLACE))
        return "recipes: something else in their place", True, []
    if kind == "bytes":
        name, data = hostile.damaged(sound.encode(), random)
        path.write_bytes(data)
        keys = [line.partition(" = ")[0] for line in lines]  # a value may have become another, which is refused
        return f"recipes: {name}", name == "noise", [*keys, "must", "target"]
    refused, keys = True, [key]
    if kind == "value":
        new = random.choice(TOML) if random.random() < 0.4 else hostile.value(random)
        lines[chosen], refused = f"{key} = {new}", False
        keys += ["target", "model", "operator", "width", "height"]
        keys += [line.partition(" = ")[0] for line in lines]
    elif kind == "key":
        lines[chosen] = f"{json.dumps(hostile.text(random))} = {old}"
    elif kind == "twice":
        lines.append(f"{key} = {old}")
    elif kind == "nested":
        depth = random.choice((50, 1000, hostile.DEEP))
        nested = ("[" * depth + "]" * depth, "{a=" * depth + "1" + "}" * depth)
        lines[chosen] = f"{key} = {random.choice(nested)}"
    else:
        lines[chosen] = random.choice((f"[{key}]", f"[[{key}]]", f"{key}.{'a.' * 5000}a = {old}", f"[{'a.' * 5000}a]"))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"recipes: {'hostile ' if kind in ('value', 'key') else ''}{kind}", refused, keys


def _prompts(path: Path, sound: str, random: Random) -> tuple[str, bool, list[str]]:
    """The same of a list of prompts."""
    lines = [f"a photograph of a {thing}" for thing in ("cat", "dog", "house", "tree", "ship")]
    kind = random.choice((*("line", "character", "bytes", "bytes") * 4, "place", "place", "long", "many"))
    refused = kind in ("place", "character")
    if kind == "place":
        hostile.put_in_place(path, random.choice(hostile.IN_PLACE))
        return "prompts: something else in their place", refused, []
    data = "\n".join(lines).encode()
    if kind == "bytes":
        kind, data = hostile.damaged(data, random)
    elif kind == "many":
        data = b"a photograph of a cat\n" * random.choice((100_000, 2_000_000))
    elif kind == "long":
        data += b"\n" + b"a cat, " * random.choice((2000, 1_000_000, 10_000_000))
    else:
        bad = random.choice(BREAKING) if kind == "character" else hostile.text(random)
        refused |= any(char in bad for char in BREAKING)
        lines.insert(random.randrange(5), f"a {bad} cat")
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return f"prompts: {kind}", refused, []
