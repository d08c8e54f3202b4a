"""The recognition scorer: a small classifier that says what a picture of the bundled model shows.

It is trained on rendered scenes only (never on generated pictures) and measured on held-out renders
before it is allowed to judge anything. *Prompt fidelity* is the share of generated pictures in which it
finds what the prompt asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .scenes import GROUNDS, PLACES, SUBJECTS, Scene, all_scenes, parse_caption

SIDE = 64
ATTRIBUTES = {"subject": tuple(SUBJECTS), "ground": tuple(GROUNDS), "place": tuple(PLACES)}


class Scorer(nn.Module):
    """(B, 3, 64, 64) pixels in [0, 1] -> logits (B, 12 + 17 + 6): subject, ground, place."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.features = nn.Sequential(
            *(
                layer
                for a, b in itertools.pairwise(widths)
                for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            )
        )
        self.head = nn.Linear(128 * 16, sum(len(names) for names in ATTRIBUTES.values()))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels - 0.5).flatten(1))


def _to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    small = [np.asarray(p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for p in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


def _split(logits: Tensor) -> dict[str, Tensor]:
    return dict(zip(ATTRIBUTES, logits.split([len(names) for names in ATTRIBUTES.values()], dim=1), strict=True))


def train_scorer(steps: int = 900, batch_size: int = 48, seed: int = 0, device: str = "cpu") -> Scorer:
    """Trains on renders with mild blur and noise, so that it judges what is drawn and not how sharply."""
    from .render import render

    torch.manual_seed(seed)
    rng, scenes = random.Random(f"scorer/{seed}"), all_scenes()
    scorer = Scorer().to(device)
    optimizer = torch.optim.AdamW(scorer.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = [rng.choice(scenes) for _ in range(batch_size)]
        pixels = _to_pixels([render(scene, rng, size=128) for scene in batch]).to(device)
        if rng.random() < 0.5:
            pixels = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
        pixels = (pixels + torch.randn_like(pixels) * rng.uniform(0, 0.05)).clamp(0, 1)
        logits = _split(scorer(pixels))
        loss = sum(F.cross_entropy(logits[a], _labels(a, batch).to(device)) for a in ATTRIBUTES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return scorer.cpu().eval()


def _labels(attribute: str, scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([ATTRIBUTES[attribute].index(getattr(s, attribute)) for s in scenes])


@torch.no_grad()
def recognise(scorer: Scorer, pictures: Sequence[Image.Image]) -> list[Scene]:
    """The most likely scene of each picture."""
    logits = _split(scorer(_to_pixels(pictures)))
    best = {a: logits[a].argmax(1).tolist() for a in ATTRIBUTES}
    return [Scene(*(ATTRIBUTES[a][best[a][i]] for a in ATTRIBUTES)) for i in range(len(pictures))]


def fidelity(scorer: Scorer, pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
    """Share of pictures showing the asked-for subject, ground and place, and their mean as ``prompt``."""
    asked, seen = [parse_caption(c) for c in captions], recognise(scorer, pictures)
    pairs = list(zip(asked, seen, strict=True))
    share = {a: sum(getattr(x, a) == getattr(y, a) for x, y in pairs) / len(pairs) for a in ATTRIBUTES}
    return share | {"prompt": sum(share.values()) / len(share)}


def evaluate_scorer(scorer: Scorer, count: int = 384, seed: int = 1) -> dict[str, float]:
    """Accuracy on fresh renders of the combinations held out from the teacher's training."""
    from .render import render

    rng = random.Random(f"scorer-test/{seed}")
    scenes = [rng.choice([s for s in all_scenes() if s.held_out]) for _ in range(count)]
    return fidelity(scorer, [render(s, rng) for s in scenes], [s.caption for s in scenes])


def load_scorer(folder: Path) -> Scorer:
    """The scorer stored beside the bundled teacher's weights."""
    from safetensors.torch import load_file

    scorer = Scorer()
    scorer.load_state_dict({k: v.float() for k, v in load_file(folder / "scorer.safetensors").items()})
    return scorer.eval()
