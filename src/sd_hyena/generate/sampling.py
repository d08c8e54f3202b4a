"""Drawing with a pipeline: every picture from its own prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def sample(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Image.Image]:
    """One picture per prompt; picture i depends on prompt i and seed i alone, not on its batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(list(prompts), generator=generators, **options).images
