"""Mutated folders of prepared data, and mutated states of training."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from . import child, hostile, tensor_files
from .judge import files_in
from .report import Report

DATA, STATES = 60, 40
LIMIT = 15.0  # seconds for one command
SHARD = "shards/00000.safetensors"
TRAIN = (
    *("train", "-m", "demo", "-W", "64", "-H", "64", "-b", "1", "-d", "1", "--init", "random", "--operator", "linear"),
    *("--draw_steps", "1", "-l", "log"),
)
DRAWN = ("--sizes", "64x64", "-n", "2", "--n_held_out", "1", "--draw_steps", "1")
PREPARE = ("prepare", "-m", "demo", *DRAWN, "-o", "data")


def run(report: Report, scale: float, seed: int) -> None:
    from sd_hyena.models import load_pipeline, locate

    pipe = load_pipeline(locate("demo"))
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folder = Path(place)
        sound = folder / "sound"
        sound.mkdir()
        run_of = [*TRAIN, "-n", "2", "-s", "1", "--data_dir", str(sound / "data"), "-o", "run"]
        for argv in (PREPARE, run_of):
            made = child.call(child.command(argv, pipe=pipe), 60, cwd=sound)
            if made.status:
                raise RuntimeError(f"{argv[0]} of sound data: {made.stderr}")
        states = int(STATES * scale)
        for number in report.numbers((DATA + STATES) * scale):
            random = report.random(number)
            there = folder / "there"
            shutil.copytree(sound, there)
            what, refused, names, points = (_state if number < states else _data)(there, random)
            argv = [*run_of, "--resume"] if number < states else [*TRAIN, "-n", "1", "--data_dir", "data", "-o", "out"]
            before = files_in(there)
            ending = child.call(child.command(argv, pipe=pipe), LIMIT, cwd=there)
            after = files_in(there)
            writes = ["run/*", "log/*", "out/*"] if not ending.status else []
            options: dict[str, Any] = {"limit": LIMIT, "names": names, "refused": refused, "writes": writes}
            wrong = child.judged(ending, files_before=before, files_after=after, **options)
            wrong = wrong or (not_finite(there) if not ending.status else "")
            report.verdict(points, what, wrong, report.again(number))
            shutil.rmtree(there)


def not_finite(folder: Path) -> str:
    """A Hyena file below a folder that no reader will take."""
    from sd_hyena import checkpoint
    from sd_hyena.errors import CheckpointError

    for path in sorted(folder.rglob("Hyena-*.safetensors")):
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            return f"silent: exit status 0, and a file that cannot be read: {error}"
    return ""


def _data(folder: Path, random: Random) -> tuple[str, bool, list[str], tuple[int, ...]]:
    """Damages ``data`` there: what was done, whether it must be refused, what a refusal names, the points."""
    data = folder / "data"
    manifest, shard = data / "manifest.json", data / SHARD
    kind = random.choice(
        ("manifest", "manifest", "manifest bytes", "shard", "tensors", "tensors", "rows", "rows", "place")
    )
    points: tuple[int, ...] = (1, 2, 4)
    if kind == "place":
        chosen = random.choice((manifest, shard, data / "shards"))
        shutil.rmtree(chosen) if chosen.is_dir() else chosen.unlink()
        hostile.put_in_place(chosen, random.choice([each for each in hostile.IN_PLACE if each != "folder"]))
        return "prepared data: something else in a file's place", True, ["data"], points
    if kind == "manifest":
        done, text = hostile.mutated_json(json.loads(manifest.read_text()), random)
        manifest.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"manifests: {done}", done in ("deep", "a key twice"), ["data"], points
    if kind == "manifest bytes":
        done, damaged = hostile.damaged(manifest.read_bytes(), random)
        manifest.write_bytes(damaged)
        return f"manifests: {done}", done in ("noise", "another format"), ["data"], points
    if kind == "shard":
        sound = shard.read_bytes()
        done, damaged = hostile.damaged(sound, random)
        shard.write_bytes(damaged)
        return f"shards: {done}", damaged != sound, ["data"], points
    if kind == "tensors":
        done, damaged, refused = tensor_files.mutated(shard.read_bytes(), random)
    else:
        done, damaged = _wrong_rows(shard.read_bytes(), random)
        refused = True
    shard.write_bytes(damaged)
    content = json.loads(manifest.read_text())
    content["shards"][0]["sha256"] = hashlib.sha256(damaged).hexdigest()  # whoever made it meant it so
    manifest.write_text(json.dumps(content))
    return f"shards with the right checksum: {done}", refused, ["data"], points


def _wrong_rows(data: bytes, random: Random) -> tuple[str, bytes]:
    """A sound safetensors file whose tensors do not belong together, or to the model."""
    import torch
    from safetensors.torch import load, save

    tensors = load(data)
    latents, states, prompt = (tensors[name] for name in ("latents", "states", "prompt"))
    changes: dict[str, dict[str, Any]] = {
        "a prompt that is not there": {"prompt": torch.full_like(prompt, 99)},
        "a prompt below zero": {"prompt": torch.full_like(prompt, -99)},
        "prompts as floats": {"prompt": prompt.float()},
        "prompts in two dimensions": {"prompt": prompt[:, None]},
        "fewer latents": {"latents": latents[1:]},
        "no latents": {"latents": latents[:0]},
        "other channels": {"latents": latents[:, :2].contiguous()},
        "another size": {"latents": latents[:, :, :, :3].contiguous()},
        "latents in three dimensions": {"latents": latents[:, 0].contiguous()},
        "latents as whole numbers": {"latents": latents.long()},
        "latents not finite": {"latents": latents.index_fill(0, torch.tensor([0]), float("nan"))},
        "other states": {"states": states[..., :5].contiguous()},
        "states in two dimensions": {"states": states[:, 0].contiguous()},
        "no states": {"states": states[:0]},
        "states not finite": {"states": torch.full_like(states, float("inf"))},
        "a scalar": {"latents": torch.tensor(1.0)},
        "complex latents": {"latents": latents.to(torch.complex64)},
    }
    name = random.choice(sorted(changes))
    header, _ = tensor_files.taken_apart(data)
    return name, save(tensors | changes[name], header.get("__metadata__"))


def _state(folder: Path, random: Random) -> tuple[str, bool, list[str], tuple[int, ...]]:
    """The same of a run's ``.train-state.pt``."""
    import torch

    from sd_hyena.distill.state import STATE

    path = folder / "run" / STATE
    names, points = [STATE, "--resume", "run/"], (1, 3, 9)
    kind = random.choice(("bytes", "bytes", "value", "value", "value", "place"))
    if kind == "place":
        path.unlink()
        hostile.put_in_place(path, random.choice(hostile.IN_PLACE))
        return "states: something else in their place", True, names, points
    if kind == "bytes":
        sound = path.read_bytes()
        kind, damaged = hostile.damaged(sound, random)
        path.write_bytes(damaged)
        return f"states: {kind}", kind in ("noise", "another format"), names, points
    state = torch.load(path, map_location="cpu", weights_only=True)
    done, refused = _changed(state, random)
    torch.save(state, path)
    return f"states: {done}", refused, names, points


def _changed(state: Any, random: Random) -> tuple[str, bool]:
    """One thing in a state made another: what, and whether it must be refused."""
    import torch

    holders = _all(state)
    holder, key = random.choice(holders)
    value = holder[key]
    if isinstance(value, torch.Tensor):
        floats = value.is_floating_point() and value.numel()
        ways = ["another shape", "no tensor", *(["not finite"] * 2 if floats else [])]
        way = random.choice(ways)
        new = {"another shape": value.new_ones((3, 1, 2)), "no tensor": "x", "not finite": value * float("nan")}
        holder[key] = new[way] if way != "not finite" or floats else value
        return f"a tensor, {way}", True
    if random.random() < 0.3 and isinstance(holder, dict):
        del holder[key]
        return "left out", False
    if random.random() < 0.2 and isinstance(holder, dict):
        holder[hostile.text(random)] = holder.pop(key)
        return "a key", False
    values: tuple[Any, ...] = (
        None,
        -1,
        1 << 62,
        10**30,
        float("nan"),
        float("inf"),
        "",
        hostile.text(random),
        [],
        {},
        [[]],
        True,
        1e308,
    )
    holder[key] = copy.deepcopy(random.choice(values))
    return "a value", False


def _all(content: Any) -> list[tuple[Any, Any]]:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    found = [(content, key) for key in keys]
    return found + [place for key in keys for place in _all(content[key])]
