"""Recording what every selected ``attn1`` saw and said during one teacher forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..targets import Target


@dataclass
class Captured:
    """Input x and output y of one layer, both (B, h * w, D), and the grid (h, w)."""

    x: Tensor
    y: Tensor
    size: tuple[int, int]


@contextlib.contextmanager
def capture(unet: nn.Module, targets: Sequence[Target], detach: bool = True) -> Iterator[dict[str, Captured]]:
    """Within the block, each forward pass of ``unet`` refills the yielded dict, by target name.

    ``detach``: records carry no gradients.
    """
    records: dict[str, Captured] = {}
    sizes: dict[str, tuple[int, int]] = {}
    handles = []

    def on_transformer(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            sizes[path] = (hidden.shape[-2], hidden.shape[-1])

        return hook

    def on_attention(target: Target):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if detach:
                x, output = x.detach(), output.detach()
            records[target.name] = Captured(x, output, sizes[target.transformer])

        return hook

    try:
        for path in {t.transformer for t in targets}:
            module = unet.get_submodule(path)
            handles.append(module.register_forward_pre_hook(on_transformer(path), with_kwargs=True))
        for target in targets:
            module = unet.get_submodule(target.path)
            handles.append(module.register_forward_hook(on_attention(target), with_kwargs=True))
        yield records
    finally:
        for handle in handles:
            handle.remove()
