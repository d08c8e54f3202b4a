"""Mutated folders and single files of models: their configurations, weights, and code of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from . import child, hostile, tensor_files
from .pickles import CODE, RAN
from .report import Report
from .scene import SMALL, Scene

COUNT = 80
LIMIT = 8.0  # seconds for one model
LARGE = (0, -1, 1, 3, 1000, 1_000_000, 1_000_000_000, 1 << 40, 1 << 62)
CODES = (
    {"_class_name": ["pipeline", "Own"]},
    {"_class_name": "Own"},
    {"_class_name": "OwnPipeline", "custom_pipeline": "pipeline"},
    {"unet": ["pipeline", "Own"]},
    {"unet": ["unet.own", "Own"]},
    {"scheduler": ["own", "Own"]},
    {"text_encoder": ["os", "system"]},
    {"custom_pipeline": "./pipeline.py"},
)


def run(report: Report, scale: float, seed: int) -> None:
    with Scene() as scene:
        sound = Path(scene.inputs["model"])
        for number in report.numbers(COUNT * scale):
            random = report.random(number)
            there = scene.root / "there"
            there.mkdir()
            model = there / "their-model"
            shutil.copytree(sound, model)
            what, refused, points = _mutate(model, random)
            line = random.choice(
                (
                    "targets -m their-model",
                    "targets -m their-model --json",
                    f"generate -m their-model {SMALL} -n 1 -p fox -o out",
                    "train -m their-model -W 64 -H 64 -b 1 -n 1 --data noise -o out -l logs",
                    "prepare -m their-model --sizes 64x64 -n 1 --n_held_out 1 --draw_steps 1 -o out",
                )
            )
            if refused:  # which only loading shows
                line = f"generate -m their-model {SMALL} -n 1 -p fox -o out"
            ending = child.call(child.command(line.split()), LIMIT, cwd=there)
            wrong = child.judged(ending, limit=LIMIT, names=["their-model"], refused=refused)
            if (there / RAN).exists():
                wrong = "code in a folder ran"
            report.verdict(points, f"models: {what}", wrong, report.again(number))
            shutil.rmtree(there)


def _mutate(model: Path, random: Random) -> tuple[str, bool, tuple[int, ...]]:
    """Damages a folder: what was done, whether it must be refused, the points."""
    kind = random.choice(("config",) * 5 + ("large",) * 5 + ("bytes",) * 3 + ("weights", "weights", "code", "place"))
    configs = sorted(path for path in model.rglob("*.json") if path.stat().st_size < 10_000)
    path = random.choice(configs)
    content = json.loads(path.read_text())
    if kind == "config":
        kind, text = hostile.mutated_json(content, random)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{path.name}, {kind}", kind == "a key twice", (1, 2, 17)
    if kind == "large":
        path = model / random.choice(("unet", "unet", "vae", "text_encoder", "scheduler")) / "config.json"
        path = path if path.exists() else path.with_name("scheduler_config.json")
        content = json.loads(path.read_text())
        numbers = [key for key, value in content.items() if type(value) in (int, list)]
        key = random.choice(numbers)
        number = random.choice(LARGE)
        content[key] = [number] * len(content[key]) if isinstance(content[key], list) else number
        path.write_text(json.dumps(content))
        return f"{path.parent.name}, numbers that cannot be", False, (2, 17)
    if kind == "bytes":
        path = random.choice([each for each in model.rglob("*") if each.suffix in (".json", ".txt")])
        kind, damaged = hostile.damaged(path.read_bytes(), random)
        path.write_bytes(damaged)
        return f"{path.name}, {kind}", False, (1,)
    if kind == "weights":
        path = random.choice(sorted(model.rglob("*.safetensors")))
        kind, damaged, refused = tensor_files.mutated(path.read_bytes(), random)
        path.write_bytes(damaged)
        finite = kind in ("a value not finite", "a value beyond float32")
        return f"weights, {kind}", refused and (finite or "twice" not in kind), (1, 4)
    if kind == "place":
        path = random.choice(sorted(path for path in model.rglob("*") if path.suffix in (".json", ".safetensors")))
        path.unlink()
        hostile.put_in_place(path, random.choice(hostile.IN_PLACE))
        return f"something else in place of {path.name}", False, (1,)
    (model / "model_index.json").write_text(
        json.dumps(json.loads((model / "model_index.json").read_text()) | random.choice(CODES))
    )
    for name in ("pipeline.py", "own.py", "unet/own.py", "unet/pipeline.py", "scheduler/own.py", "modeling.py"):
        (model / name).write_text(f"{CODE}\nclass Own: pass\n")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Own"}}))
    return "code of their own", False, (3,)
