"""The recognition scorer: a small classifier that says what a picture of the bundled model shows.

It was trained on rendered scenes only (never on generated pictures) and measured on held-out renders
before it was allowed to judge anything. *Prompt fidelity* is the share of generated pictures in which it
finds what the prompt asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from .scenes import GROUNDS, PLACES, SUBJECTS, Scene, parse_caption

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


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """What the scorer looks at: (B, 3, 64, 64) in [0, 1]."""
    small = [np.asarray(p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for p in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


def split(logits: Tensor) -> dict[str, Tensor]:
    """The logits of each attribute."""
    return dict(zip(ATTRIBUTES, logits.split([len(names) for names in ATTRIBUTES.values()], dim=1), strict=True))


@torch.no_grad()
def recognise(scorer: Scorer, pictures: Sequence[Image.Image]) -> list[Scene]:
    """The most likely scene of each picture."""
    logits = split(scorer(to_pixels(pictures)))
    best = {a: logits[a].argmax(1).tolist() for a in ATTRIBUTES}
    return [Scene(*(ATTRIBUTES[a][best[a][i]] for a in ATTRIBUTES)) for i in range(len(pictures))]


def fidelity(scorer: Scorer, pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
    """Share of pictures showing the asked-for subject, ground and place, and their mean as ``prompt``."""
    asked, seen = [parse_caption(c) for c in captions], recognise(scorer, pictures)
    pairs = list(zip(asked, seen, strict=True))
    share = {a: sum(getattr(x, a) == getattr(y, a) for x, y in pairs) / len(pairs) for a in ATTRIBUTES}
    return share | {"prompt": sum(share.values()) / len(share)}


def load_scorer(folder: Path) -> Scorer:
    """The scorer stored beside the bundled teacher's weights."""
    scorer = Scorer()
    scorer.load_state_dict({k: v.float() for k, v in load_file(folder / "scorer.safetensors").items()})
    return scorer.eval()
