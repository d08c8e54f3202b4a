"""NaN, infinity and a lack of memory in every command: in the files that it reads, and while it computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from . import child, meddle
from .judge import files_in
from .report import Report
from .scene import Scene

FILES, COMPUTED, MEMORY = 30, 30, 40
LIMIT = 30.0  # seconds for one command
MODELS = ("train, stage 2", "prepare", "generate", "evaluate", "anatomy", "benchmark image")
COMPUTING = ("train", *MODELS)
WEIGHTS = ("unet", "vae", "text_encoder")
# What another way of adding may make: mean difference in levels; relative root mean square, of tensors and of outputs.
PICTURE, TENSOR, OUTPUT = 3.0, 0.05, 0.01


def run(report: Report, scale: float, seed: int) -> None:
    with Scene() as scene:
        made: dict[str, tuple[int, list[int], Path]] = {}  # by command: heavy operations, their bytes, results
        kinds = [("files", FILES), ("computed", COMPUTED), ("memory", MEMORY)]
        for number in report.numbers(sum(count for _, count in kinds) * scale):
            random = report.random(number)
            kind = random.choices([kind for kind, _ in kinds], [count for _, count in kinds])[0]
            name = random.choice(MODELS if kind == "files" else COMPUTING)
            if kind == "files":
                what, wrong = _bad_file(scene, name, random)
                report.verdict((4, 13), what, wrong, report.again(number))
                continue
            if name not in made:
                made[name] = _undisturbed(scene, name)
            operations, sizes, results = made[name]
            if kind == "computed":
                at = meddle.not_a_number(random.randint(1, operations), random.choice((float("nan"), float("inf"))))
                what, points = f"not finite while computing: {name}", (13,)
            else:
                at, what = _memory(random, operations, sizes)
                what, points = f"out of memory, {what}: {name}", (14,)
            wrong = _meddled(scene, name, at, results, kind == "memory")
            report.verdict(points, what, wrong, report.again(number))


def _memory(random: Random, operations: int, sizes: list[int]) -> tuple[Callable[[int, Any], None], str]:
    way = random.choice(("once", "thrice", "less of it"))
    if way == "less of it":
        return meddle.larger_than(int(max(sizes) * random.choice((0.9, 0.6, 0.3)))), way
    cuda = random.random() < 0.3
    return meddle.out_of_memory(random.randint(1, operations), 1 if way == "once" else 3, cuda), way


def _meddled(scene: Scene, name: str, at: Callable[[int, Any], None], results: Path, memory: bool) -> str:
    """One command with something wrong within torch; it fails with a line, or leaves the same results."""
    folder = scene.folder()
    before = files_in(folder)
    ending = child.call(partial(_work, scene.words(name), at), LIMIT, memory=4 << 30, cwd=folder)
    wrong = child.judged(ending, limit=LIMIT, files_before=before, files_after=files_in(folder))
    if not wrong and not ending.status:
        wrong = not_finite_in(folder) or differs(results, folder)
        if "not finite" in ending.stderr and wrong.startswith("silent"):  # it is said what is missing
            wrong = ""
        if memory and not wrong and "memory" not in ending.stderr + ending.stdout:
            wrong = "silent: nothing was said of a lack of memory"
    shutil.rmtree(folder)
    return wrong


def _work(argv: list[str], at: Callable[[int, Any], None]) -> int:
    with meddle.Meddler(at):
        return child.command(argv)()


def _undisturbed(scene: Scene, name: str) -> tuple[int, list[int], Path]:
    """How many heavy operations a command has, the bytes of each one's output, and the folder that it leaves."""
    folder, sizes = scene.folder(), scene.root / f"sizes-{name}"

    def work() -> int:
        noted: list[int] = []
        status = _work(scene.words(name), meddle.largest(noted))
        sizes.write_text(" ".join(map(str, noted)))
        return status

    ending = child.call(work, LIMIT * 2, memory=4 << 30, cwd=folder)
    if ending.status:
        raise RuntimeError(f"{name}, undisturbed: {ending.stderr}")
    noted = [int(size) for size in sizes.read_text().split()]
    return len(noted), noted, folder


def _bad_file(scene: Scene, name: str, random: Random) -> tuple[str, str]:
    """A model of which one tensor is not finite, or so large that nothing computed from it is."""
    from safetensors.torch import load_file, save_file

    part, kind = random.choice(WEIGHTS), random.choice(("NaN", "infinity", "huge values"))
    folder = scene.folder(strangers=False)
    shutil.copytree(scene.inputs["model"], folder / "their-model")
    path = next((folder / "their-model" / part).glob("*.safetensors"))
    tensors = load_file(path)
    used = sorted(key for key in tensors if key.endswith("weight") and not key.startswith(("encoder", "quant")))
    key = random.choice(used)  # drawing uses the VAE's other half
    if kind == "huge values":
        tensors[key] = huge(tensors[key])
    else:
        tensors[key].view(-1)[random.randrange(tensors[key].numel())] = float("nan" if kind == "NaN" else "inf")
    save_file(tensors, path, {"format": "pt"})
    argv = [word.replace(scene.inputs["model"], "their-model") for word in scene.words(name)]
    argv += ["--cfg_scale", "3"] if name == "generate" else []
    before = files_in(folder)
    ending = child.call(child.command(argv), LIMIT, memory=4 << 30, cwd=folder)
    options: dict[str, Any] = {"limit": LIMIT, "files_before": before, "files_after": files_in(folder)}
    wrong = child.judged(ending, refused=kind != "huge values", **options)
    if not wrong and not ending.status:
        wrong = not_finite_in(folder) or ("silent: nan in what it prints" if " nan" in ending.stdout.lower() else "")
    shutil.rmtree(folder)
    return f"{kind} in a weight: {part.replace('_', ' ')}, {name}", wrong and f"{key}: {wrong}"


def huge(tensor: Any) -> Any:
    """The same full of values as large as its type holds."""
    import torch

    return torch.full_like(tensor, min(1e38, torch.finfo(tensor.dtype).max))


def not_finite_in(folder: Path) -> str:
    """What in a folder of results can only come from NaN: weights, tables, and pictures of one colour."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import load_file

    for path in sorted(folder.rglob("*")):
        if {"their-model", "theirs"} & {*path.parts} or path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            if not all(bool(value.float().isfinite().all()) for value in load_file(path).values()):
                return f"silent: {path.name} holds NaN or infinity"
        elif path.suffix == ".json" and ("NaN" in path.read_text() or "Infinity" in path.read_text()):
            return f"silent: {path.name} holds NaN or infinity"
        elif path.suffix == ".png" and path.name.startswith("image_") and not np.asarray(Image.open(path)).any():
            return f"silent: {path.name} is black"
    return ""


def computed(path: Path) -> dict[str, Any]:
    """What each layer of a Hyena file makes of the same noise. Its weights tell less: one without influence, such as
    that of a grid's only block, has gradients of rounding alone, and Adam makes as much of those."""
    import torch

    from sd_hyena import checkpoint

    file, outputs = checkpoint.load(path), {}
    for name, layer in file.layers.items():
        config = layer.config
        noise = torch.randn(2, config.height * config.width, config.dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs[name] = file.build(name)(noise, (config.height, config.width))
    return outputs


def differs(wanted: Path, got: Path) -> str:
    """What in a folder is not, but for rounding, what an undisturbed run left in another."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import load_file

    for path in sorted(wanted.rglob("*")):
        other = got / path.relative_to(wanted)
        if path.name.startswith(".") or {"logs", "theirs"} & {*path.parts} or not path.is_file():
            continue
        if not other.exists():
            return f"silent: exit status 0 without {other.name}"
        if path.suffix == ".png" and path.name.startswith(("image_", "grid", "sheet")):
            pictures = [np.asarray(Image.open(each), dtype=float) for each in (path, other)]
            if pictures[0].shape != pictures[1].shape or np.abs(pictures[0] - pictures[1]).mean() > PICTURE:
                return f"another picture: {other.name}"
        elif path.suffix == ".safetensors":
            tolerance, read = (OUTPUT, computed) if path.name.startswith("Hyena") else (TENSOR, load_file)
            left, right = read(path), read(other)
            for key, value in left.items():
                limit = tolerance * value.float().norm() + 1e-6
                if key not in right or (value.float() - right[key].float()).norm() > limit:
                    return f"another result: {key} of {other.name}"
    return ""
