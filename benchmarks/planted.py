"""Which operator comes closest to attention of known character? One planted softmax layer, minutes on two cores.

    python benchmarks/planted.py                 # three teachers x three seeds x every student
    python benchmarks/planted.py --unet          # the same question on the bundled UNet's own activations
    python benchmarks/planted.py --students "linear;near 7 + states 4" --teachers mixed

The layer attends over 8x8-pixel patch features of textured pictures that this file draws, 32x32 cells, 64 channels,
four heads; its keys resemble its queries. ``global`` heads look everywhere, ``local`` ones have a Gaussian position
bias, ``mixed`` is half and half. Every student starts from the teacher's projections and is trained once for equal
steps and once for equal time; errors are on held-out pictures, 1 is a constant's. Each branch of a hybrid is switched
off in turn after training. With ``--unet``, a bias of 2 or 5 cells is planted into half of the heads of the bundled
UNet's finest layers, and students are taught as by ``sd-hyena train``.

Results are kept row by row in STEM.json, so that an interrupted run goes on; STEM.md and STEM.png are written from it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import planted_unet
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from planted_report import write
from torch import Tensor, nn

from sd_hyena.config import OperatorConfig
from sd_hyena.demo.scenes import TEXTURES
from sd_hyena.distill.losses import Distance
from sd_hyena.machine import machine
from sd_hyena.nn import Operator, build

sys.path.append(str(Path(__file__).parents[1] / "teacher"))
from grounds import draw_ground  # as for the bundled teacher

EDGE, PATCH, DIM, HEADS = 32, 8, 64, 4
PICTURES, HELD_OUT, BATCH = 80, 16, 4
NOISE = 0.3
LIKENESS = 0.8  # of keys to queries
SIGMAS: dict[str, tuple[float, ...]] = {
    "global": (0, 0, 0, 0),
    "mixed": (2, 5, 0, 0),
    "local": (2, 5, 2, 5),
}
RATE = 4e-3


class PlantedAttention(nn.Module):
    """Softmax attention with a Gaussian position bias of ``sigmas`` cells in its heads; 0: none. x: (B, L, D)."""

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, (DIM // HEADS) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(DIM, DIM)])
        q, k, v = (torch.randn(DIM, DIM) / math.sqrt(DIM) for _ in range(3))
        weights = (q, LIKENESS * q + math.sqrt(1 - LIKENESS**2) * k, v, torch.eye(DIM))
        for layer, weight in zip((self.to_q, self.to_k, self.to_v, self.to_out[0]), weights, strict=True):
            layer.weight.data.copy_(weight)
        self.to_out[0].bias.data.zero_()
        self.register_buffer("bias", planted_unet.position_bias(sigmas, (EDGE, EDGE)))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def picture(rng: np.random.Generator) -> Image.Image:
    """Three textures in 256 px: one behind, two more in an ellipse and a box somewhere."""
    size = EDGE * PATCH
    names = rng.choice(list(TEXTURES), 3, replace=False)
    whole, *others = (draw_ground(str(name), size, rng.uniform(0.7, 1.3), rng) for name in names)
    for draw, texture in zip(("ellipse", "rectangle"), others, strict=True):
        mask = Image.new("L", (size, size))
        x, y, w, h = rng.uniform((0, 0, 60, 60), (size - 60, size - 60, 170, 170))
        getattr(ImageDraw.Draw(mask), draw)((x, y, x + w, y + h), fill=255)
        whole.paste(texture, mask=mask)
    return whole


def features(seed: int) -> Tensor:
    """(PICTURES + HELD_OUT, L, D): whitened principal components of the pictures' patches, with noise."""
    rng = np.random.default_rng(seed)
    pixels = torch.stack([torch.from_numpy(np.asarray(picture(rng)).copy()) for _ in range(PICTURES + HELD_OUT)])
    patches = F.pixel_unshuffle(pixels.permute(0, 3, 1, 2).float() / 255, PATCH).flatten(2).transpose(1, 2)
    centred = (patches - patches.mean((0, 1))).flatten(0, 1)
    z = patches.sub(patches.mean((0, 1))) @ torch.linalg.svd(centred[::7], full_matrices=False).Vh[:DIM].T
    spread = z.flatten(0, 1).std(0)
    z = z / (spread + 0.02 * spread.max())
    return F.layer_norm(z + NOISE * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)), (DIM,))


STUDENTS: dict[str, dict[str, Any]] = {
    "linear, elu + 1": {"operator": "linear", "feature_map": "elu"},
    "linear, exp": {"operator": "linear", "feature_map": "exp"},
    "linear": {"operator": "linear"},
    "near 3": {"operator": "near"},
    "near 7": {"operator": "near", "near": 7},
    "states 8": {"near": 0},
    "states 8 + near 3, exp": {"feature_map": "exp"},
    "states 8 + near 3, squared ReLU": {"feature_map": "squared_relu"},
    "states 8 + near 3": {},
    "states 8 + near 3, not fitted": {"fitted": False},
    "states 8 + near 3, one rate": {"rate": 1.0},
    "states 8 + near 7": {"near": 7},
    "states 4 + near 3": {"block": 4},
    "states 4 + near 3, short filter": {"block": 4, "short": True},
    "states 4 + near 3, gates": {"block": 4, "gates": True},
    "long": {"operator": "long"},
    "causal": {"operator": "causal"},
    "windows 8 (rival)": {"operator": "windows"},
}


class Wrapped(nn.Module):
    """What earned no place in an operator, around one: a 3x3 filter on its input, or a gate on its output."""

    branches = ()

    def __init__(self, operator: Operator, short: bool, gates: bool) -> None:
        super().__init__()
        self.operator = operator
        self.short = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM, bias=False) if short else None
        self.gate = nn.Linear(DIM, DIM) if gates else None
        if self.short is not None:
            nn.init.dirac_(self.short.weight, groups=DIM)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.gate is not None:
            return self.gate(x) * self.operator(x, size)
        planes = x.transpose(1, 2).unflatten(2, size)
        return self.operator(self.short(planes).flatten(2).transpose(1, 2), size)

    def parameter_groups(self, rate: float, weight_decay: float) -> list[dict[str, Any]]:
        own = [p for part in (self.short, self.gate) if part is not None for p in part.parameters()]
        return [*self.operator.parameter_groups(rate, weight_decay), {"params": own, "lr": rate}]


class Bed:
    """One teacher and its pictures; what a student is taught from and held to."""

    def __init__(self, teacher: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.attention, self.x = PlantedAttention(SIGMAS[teacher]), features(seed)
        self.y = torch.cat([self.attention(x) for x in self.x.split(BATCH)])
        self.variance = self.y[:PICTURES].var((0, 1)).mean()
        self.seed = seed

    def facts(self) -> dict[str, float]:
        """Entropy over log L, and the share of attention within 7x7 cells; means over heads and held-out pictures."""
        x, a = self.x[PICTURES:], self.attention
        q, k = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (a.to_q, a.to_k))
        weights = (a.scale * q @ k.transpose(-1, -2) + a.bias).softmax(-1)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean() / math.log(EDGE**2)
        near = planted_unet.squared_distance((EDGE, EDGE), chebyshev=True) <= 9
        return {"entropy": entropy.item(), "mass_7": (weights * near).sum(-1).mean().item()}

    def student(self, name: str) -> Operator | Wrapped:
        """Untrained, started from the teacher."""
        torch.manual_seed(100 + self.seed)
        choices = dict(STUDENTS[name])
        fitted, rate, around = choices.pop("fitted", True), choices.pop("rate", None), {
            key: choices.pop(key, False) for key in ("short", "gates")
        }  # fmt: skip
        operator = build(OperatorConfig(DIM, EDGE, EDGE, attention_heads=HEADS, **choices))
        operator.start_from(self.attention, [(self.x[: 2 * BATCH], (EDGE, EDGE))] if fitted else [])
        operator.unfold()
        if rate is not None:
            operator.rates = {}
        return Wrapped(operator, **around) if any(around.values()) else operator

    def train(self, name: str, steps: int) -> tuple[Operator | Wrapped, float]:
        """The trained operator, and seconds a step."""
        operator = self.student(name)
        groups = operator.parameter_groups(RATE, 0.0)
        optimizer = torch.optim.Adam(groups, lr=RATE, betas=(0.9, 0.99))
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
        generator = torch.Generator().manual_seed(self.seed)
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            chosen = torch.randint(PICTURES, (BATCH,), generator=generator)
            loss = (operator(self.x[chosen], (EDGE, EDGE)) - self.y[chosen]).square().mean() / self.variance
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(operator.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            times.append(time.perf_counter() - began)
        return operator, statistics.median(times)

    @torch.no_grad()
    def error(self, operator: nn.Module) -> float:
        """Mean relative error on held-out pictures."""
        distance = Distance()
        for x, y in zip(self.x[PICTURES:].split(BATCH), self.y[PICTURES:].split(BATCH), strict=True):
            distance.add(operator(x, (EDGE, EDGE)), y)
        return distance.figures()["relative_error"]

    def measure(self, name: str, steps: int, seconds: float) -> dict[str, Any]:
        """Errors at the start, after equal steps and after equal time, and without each branch."""
        start = self.error(self.student(name))
        operator, each = self.train(name, steps)
        result: dict[str, Any] = {"start": start, "steps": self.error(operator), "step_seconds": each, "without": {}}
        for branch in operator.branches:
            operator.off = branch
            result["without"][branch] = self.error(operator)
        as_long = max(10, round(seconds / each))
        result |= {"time": self.error(self.train(name, as_long)[0]), "time_steps": as_long}
        return result | {"parameters": sum(p.numel() for p in operator.parameters())}


def chosen(asked: str, names: list[str], what: str) -> list[str]:
    """The names of a ;-separated list, or all of them. Raises SystemExit for others."""
    words = [word.strip() for word in asked.split(";") if word.strip()]
    unknown = [word for word in words if word not in names]
    if unknown:
        raise SystemExit(f"planted: no {what} {unknown[0]!r}; there are {'; '.join(names)}")
    return words or names


def main() -> None:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", action="store_true", help="on the bundled UNet's activations")
    parser.add_argument("--students", default="", help="names, separated by ; (default: all)")
    parser.add_argument("--teachers", default="", help="global, mixed, local, separated by ; (default: all)")
    parser.add_argument("--seeds", type=int, default=0, help="(default: 3; with --unet 1)")
    parser.add_argument("--steps", type=int, default=0, help="of training (default: 80; with --unet 120)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of training at equal time (default: %(default)s)")
    parser.add_argument("--out", default="", help=f"STEM of the files (default: {results}/planted, or planted-unet)")
    args = parser.parse_args()
    if args.unet:
        names = chosen(args.students, list(planted_unet.ROWS), "student")
        planted_unet.run(names, args.steps or 120, args.seeds or 1, Path(args.out or results / "planted-unet"))
        return
    steps, out = args.steps or 80, Path(args.out or results / "planted")
    path = out.with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for teacher in chosen(args.teachers, list(SIGMAS), "teacher"):
        for seed in range(args.seeds or 3):
            bed = None
            for name in chosen(args.students, list(STUDENTS), "student"):
                key, settings = f"{teacher}/{seed}/{name}", {"steps": steps, "seconds": args.seconds}
                if rows.get(key, {}).get("settings") == settings:
                    continue
                bed = bed or Bed(teacher, seed)
                rows[key] = bed.measure(name, steps, args.seconds) | {"settings": settings} | bed.facts()
                print(f"{key}: {rows[key]['steps']:.4f}, {rows[key]['time']:.4f} at equal time", flush=True)
                write(out, rows, machine("cpu"), list(STUDENTS))
    write(out, rows, machine("cpu"), list(STUDENTS))


if __name__ == "__main__":
    main()
