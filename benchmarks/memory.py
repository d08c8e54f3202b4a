"""What training takes of memory, counted without a GPU or a download: ``python benchmarks/memory.py``.

Tensors are fakes, which have sizes and no contents; what PyTorch's own operations hold inside is not seen. Prints a
Markdown table: in GB, the UNet's weights, what a teacher pass holds at most, what ``--reuse`` keeps of the passes, and
what an update of all students of ``high`` holds at most, gradients included.
"""

from __future__ import annotations

import argparse
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd_hyena.config import OperatorConfig
from sd_hyena.distill.capture import capture
from sd_hyena.families import FAMILIES
from sd_hyena.nn import build
from sd_hyena.targets import find_targets, select

MODELS = {"sd15": 512, "sd21": 768, "sdxl": 1024}  # picture sizes in px
GB = 1e9


@contextlib.contextmanager
def set_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Held(TorchDispatchMode):
    """``now``, ``peak``: bytes of the tensors made within the block."""

    now = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                known.add(storage._cdata)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def measure(model: str, batch: int, reuse: int, dtype: torch.dtype) -> list[float]:
    """The table's numbers, in GB."""
    family, cells = FAMILIES[model], MODELS[model] // 8
    with FakeTensorMode(), set_default_dtype(dtype):
        unet = UNet2DConditionModel.from_config(family.config("unet")).eval().requires_grad_(False)
        targets = select(find_targets(unet), "high")
        x, states = torch.randn(batch, 4, cells, cells), torch.randn(batch, 77, unet.config.cross_attention_dim)
        pooled = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.randn(batch, 6)}
        with torch.no_grad(), Held() as teaching, capture(unet, targets) as records:
            unet(x, torch.ones(batch), states, added_cond_kwargs=pooled)
        lesson = sum(t.nbytes for r in records.values() for t in (r.x, r.y))
        operators = {}
        for target in targets:
            h, w = target.grid((cells, cells))
            config = OperatorConfig(target.dim, h, w, target.inner_dim, attention_heads=target.heads)
            operators[target.name] = build(config).train()
        with Held() as learning:
            sum((operators[name](r.x, r.size) - r.y).square().mean() for name, r in records.items()).backward()
    weights = sum(p.nbytes for p in unet.parameters())
    return [n / GB for n in (weights, teaching.peak, reuse * lesson, learning.peak)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of sd15, sd21, sdxl (default: all)")
    parser.add_argument("--batch_size", type=int, default=16, help="(default: 16, as in standard)")
    parser.add_argument("--reuse", type=int, default=4, help="(default: 4, as in the recipes)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    print("| model, picture | UNet's weights | teacher pass | kept passes | update | together |")
    print("|---|---:|---:|---:|---:|---:|")
    for model in args.models.split(","):
        weights, teaching, kept, update = measure(model, args.batch_size, args.reuse, getattr(torch, args.dtype))
        cells = [weights, teaching, kept, update, weights + kept + max(teaching, update)]
        print(f"| {model}, {MODELS[model]} px | {' | '.join(f'{n:.1f}' for n in cells)} |", flush=True)


if __name__ == "__main__":
    main()
