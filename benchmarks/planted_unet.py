"""The bundled UNet with a position bias planted into half of the heads of its finest layers, and students of it."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from sd_hyena.distill.prepare import training_data
from sd_hyena.distill.settings import TrainSettings
from sd_hyena.distill.trainer import Trainer
from sd_hyena.files import write_file
from sd_hyena.fingerprint import fingerprint
from sd_hyena.machine import describe, machine
from sd_hyena.models import DEMO, load_pipeline, locate
from sd_hyena.targets import find_targets, select

BEDS = ("planted", "as it is")


def squared_distance(size: tuple[int, int], chebyshev: bool = False) -> Tensor:
    """(L, L): squared distance between cells of a grid; ``chebyshev``: by the larger of the two axes."""
    y, x = (a.flatten().float() for a in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    down, across = (y[:, None] - y).square(), (x[:, None] - x).square()
    return torch.maximum(down, across) if chebyshev else down + across


def position_bias(sigmas: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """(1, heads, L, L): what is added to the scores, a Gaussian of so many cells; 0: nothing."""
    squared = squared_distance(size)
    return torch.stack([-squared / (2 * s * s) if s else torch.zeros_like(squared) for s in sigmas])[None]


class PlantedProcessor:
    """Softmax attention with a Gaussian position bias in its first half of heads, on square grids."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        half = attn.heads // 2
        sigmas = (self.sigma,) * half + (0.0,) * (attn.heads - half)
        edge = math.isqrt(hidden_states.shape[1])
        q, k, v = (
            p(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v)
        )
        bias = _cached_bias(sigmas, (edge, edge)).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))


_cached_bias = functools.cache(position_bias)


def plant(unet: nn.Module) -> None:
    """A bias of 2 cells and of 5 in turn, into half of the heads of each layer of the finest level."""
    for number, target in enumerate(select(find_targets(unet), "high")):
        unet.get_submodule(target.path).set_processor(PlantedProcessor((2.0, 5.0)[number % 2]))


ROWS: dict[str, dict[str, Any]] = {
    "linear, elu + 1": {"operator": "linear", "feature_map": "elu"},
    "linear": {"operator": "linear"},
    "near 3": {"operator": "near"},
    "near 7": {"operator": "near", "near": 7},
    "states 8": {"near": 0},
    "states 8 + near 3, squared ReLU": {"feature_map": "squared_relu"},
    "states 8 + near 3, exp": {"feature_map": "exp"},
    "states 8 + near 3": {},
    "states 4 + near 3": {"block": 4},
    "long": {"operator": "long"},
    "windows 8 (rival)": {"operator": "windows"},
}


def run(names: Sequence[str], steps: int, seeds: int, stem: Path) -> None:
    """Measures those rows that ``stem``.json lacks, for each seed, on the UNet with the bias planted and as it is."""
    path = stem.with_suffix(".json")
    identity = {"steps": steps, "teacher": fingerprint(load_pipeline(locate(DEMO)))["attention_sha256"]}
    stored = json.loads(path.read_text())["rows"] if path.exists() else {}
    results = {key: row for key, row in stored.items() if row["identity"] == identity}
    for bed in BEDS:
        pipe = load_pipeline(locate(DEMO))
        teacher = fingerprint(pipe)
        if bed == "planted":
            plant(pipe.unet)
            teacher["attention_sha256"] = "planted"  # its pictures are its own
        for key, seed, name in [(f"{bed}/{s}/{name}", s, name) for s in range(1, seeds + 1) for name in names]:
            if key not in results:
                results[key] = {"identity": identity, **_measure(ROWS[name], pipe, teacher, steps, seed)}
                print(f"{key}: {results[key]['error']:.4f} in {results[key]['seconds']:.0f} s", flush=True)
                _write(stem, results, steps)
    _write(stem, results, steps)


def _measure(choices: dict[str, Any], pipe: Any, teacher: dict[str, str], steps: int, seed: int) -> dict[str, Any]:
    settings = TrainSettings(
        teacher_model=DEMO, target="high", width=256, height=256, n_steps=steps, batch_size=8, reuse=4, n_images=64,
        n_held_out=16, draw_steps=10, save_every_n_steps=0, seed=seed, out_dir="out/planted", device="cpu",
        **choices,
    )  # fmt: skip
    settings.validate()
    Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
    training_data(settings, pipe, teacher, is_demo=True)  # drawing is not a row's own time
    result = Trainer(settings, pipe, teacher, Accelerator(cpu=True), is_demo=True).run()
    if result.interrupted:
        raise KeyboardInterrupt
    errors = {name: figures["relative_error"] for name, figures in result.figures.items()}
    return {"error": statistics.mean(errors.values()), "errors": errors, "seconds": result.seconds}


def _write(stem: Path, results: dict[str, Any], steps: int) -> None:
    facts = machine("cpu")
    lines = [
        "# A bias planted into the bundled UNet",
        "",
        f"{describe(facts)}; {facts['date']}. `python benchmarks/planted.py --unet`",
        "",
        f"Five finest layers at 256 px, stage 1, {steps} steps of batch 8, a teacher pass for every fourth; mean "
        "relative error on held-out latents. Planted: a Gaussian position bias of 2 or 5 cells in half of each "
        "layer's heads. Where there are several seeds: their mean and, in brackets, their least and largest.",
        "",
        "| student | planted | as it is | training s |",
        "|---|---:|---:|---:|",
    ]
    for name in ROWS:
        cells, seconds = [], []
        for bed in BEDS:
            found = [r for key, r in results.items() if key.split("/", 2)[::2] == [bed, name]]
            errors = [r["error"] for r in found]
            seconds += [r["seconds"] for r in found]
            spread = f" ({min(errors):.4f}-{max(errors):.4f})" if len(errors) > 1 else ""
            cells.append(f"{statistics.mean(errors):.4f}{spread}" if errors else "-")
        if seconds:
            lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.0f} |")
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"machine": facts, "rows": results}, indent=1)
    for suffix, text in ((".json", data), (".md", "\n".join(lines))):
        write_file(stem.with_suffix(suffix), text + "\n")
