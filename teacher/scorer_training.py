"""Trains the recognition scorer on rendered scenes, and measures it on renders of held-out combinations."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from render import render
from torch import Tensor

from sd_hyena.demo.scenes import Scene, all_scenes
from sd_hyena.demo.scorer import ATTRIBUTES, Scorer, fidelity, split, to_pixels


def train_scorer(steps: int = 900, batch_size: int = 48, seed: int = 0, device: str = "cpu") -> Scorer:
    """Trains on renders with mild blur and noise, so that it judges what is drawn and not how sharply."""
    torch.manual_seed(seed)
    rng, scenes = random.Random(f"scorer/{seed}"), all_scenes()
    scorer = Scorer().to(device)
    optimizer = torch.optim.AdamW(scorer.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = [rng.choice(scenes) for _ in range(batch_size)]
        pixels = to_pixels([render(scene, rng, size=128) for scene in batch]).to(device)
        if rng.random() < 0.5:
            pixels = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
        pixels = (pixels + torch.randn_like(pixels) * rng.uniform(0, 0.05)).clamp(0, 1)
        logits = split(scorer(pixels))
        loss = sum(F.cross_entropy(logits[a], _labels(a, batch).to(device)) for a in ATTRIBUTES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return scorer.cpu().eval()


def _labels(attribute: str, scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([ATTRIBUTES[attribute].index(getattr(s, attribute)) for s in scenes])


def evaluate_scorer(scorer: Scorer, count: int = 384, seed: int = 1) -> dict[str, float]:
    """Accuracy on fresh renders of the combinations held out from the teacher's training."""
    rng = random.Random(f"scorer-test/{seed}")
    scenes = [rng.choice([s for s in all_scenes() if s.held_out]) for _ in range(count)]
    return fidelity(scorer, [render(s, rng) for s in scenes], [s.caption for s in scenes])
