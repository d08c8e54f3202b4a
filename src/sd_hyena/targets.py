"""Names of self-attention layers: ``IN01`` <-> diffusers module path <-> LDM key.

A name is a position in the original checkpoints' numbering, derived from the UNet's own structure: with
n = layers_per_block, the attention in down block b at index a is input block ``1 + b (n + 1) + a``, the
one in up block b is output block ``b (n + 1) + a``. Blocks with several transformer layers (SDXL) add a
suffix: ``IN07.3``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import OperatorConfig
from .errors import UsageError

if TYPE_CHECKING:
    from torch import nn

NAME = re.compile(r"(?:(?:IN|OUT)\d{2}|M00)(?:\.\d{1,3})?")
GROUPS = ("all", "high")
SUPPORTED = "Stable Diffusion 1, 2 and XL"


@dataclass(frozen=True)
class Target:
    """One replaceable layer.

    ``downscale`` is how many times smaller than the latent image its grid is, per axis; ``transformer``
    is the path of the enclosing ``Transformer2DModel``, ``path`` that of ``attn1`` itself.
    """

    name: str
    path: str
    transformer: str
    ldm_key: str
    dim: int
    inner_dim: int
    heads: int
    downscale: int

    def grid(self, latent: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the layer for a latent image of (h, w) cells: each downsampling rounds up."""
        h, w = latent
        factor = self.downscale
        while factor > 1:
            h, w, factor = -(-h // 2), -(-w // 2), factor // 2
        return h, w


def find_targets(unet: nn.Module) -> dict[str, Target]:
    """All replaceable layers of a UNet by name, in the order they run.

    Raises UsageError if the module is not a UNet of the Stable Diffusion family.
    """
    known = all(hasattr(unet, name) for name in ("down_blocks", "mid_block", "up_blocks", "config"))
    if not known or "layers_per_block" not in unet.config:
        raise UsageError(f"{type(unet).__name__} is no UNet of {SUPPORTED}, and Hyena layers are for those alone")
    layers = unet.config.layers_per_block
    count = len(unet.down_blocks)
    per_block = list(layers) if isinstance(layers, list | tuple) else [layers] * count
    found: dict[str, Target] = {}
    start = 1
    for b, block in enumerate(unet.down_blocks):
        for a, module in enumerate(getattr(block, "attentions", ())):
            _add(
                found,
                f"IN{start + a:02d}",
                f"down_blocks.{b}.attentions.{a}",
                f"input_blocks.{start + a}.1",
                module,
                2**b,
            )
        start += per_block[b] + 1
    for a, module in enumerate(getattr(unet.mid_block, "attentions", ())):
        _add(found, f"M{a:02d}", f"mid_block.attentions.{a}", f"middle_block.{2 * a + 1}", module, 2 ** (count - 1))
    start = 0
    for b, block in enumerate(unet.up_blocks):
        for a, module in enumerate(getattr(block, "attentions", ())):
            _add(
                found,
                f"OUT{start + a:02d}",
                f"up_blocks.{b}.attentions.{a}",
                f"output_blocks.{start + a}.1",
                module,
                2 ** (count - 1 - b),
            )
        start += per_block[count - 1 - b] + 1
    if not found:
        raise UsageError(f"{type(unet).__name__} has no self-attention layers as UNets of {SUPPORTED} have them")
    return found


def _add(found: dict[str, Target], name: str, path: str, ldm: str, transformer: nn.Module, downscale: int) -> None:
    if not hasattr(transformer, "transformer_blocks") and hasattr(transformer, "module"):  # wrapped to run in splits
        path, transformer = f"{path}.module", transformer.module
    if hasattr(transformer, "temporal_transformer_blocks"):  # of video, with a forward of its own
        return
    blocks = getattr(transformer, "transformer_blocks", ())
    for k, block in enumerate(blocks):
        attention = getattr(block, "attn1", None)
        if attention is None or getattr(attention, "is_cross_attention", False):
            continue
        full_name = name if len(blocks) == 1 else f"{name}.{k}"
        found[full_name] = Target(
            name=full_name,
            path=f"{path}.transformer_blocks.{k}.attn1",
            transformer=path,
            ldm_key=f"model.diffusion_model.{ldm}.transformer_blocks.{k}.attn1",
            dim=attention.query_dim,
            inner_dim=attention.inner_dim,
            heads=attention.heads,
            downscale=downscale,
        )


def parse_names(text: str) -> list[str]:
    """Splits and checks a comma list of names and group words, without needing a UNet.

    ``"in01, HIGH"`` -> ``["IN01", "high"]``. Raises UsageError for a malformed or repeated name.
    """
    names = []
    for part in text.split(","):
        word = part.strip()
        name = word.lower() if word.lower() in GROUPS else word.upper()
        if name not in GROUPS and not NAME.fullmatch(name):
            raise UsageError(
                f"target {word!r} is not a layer name: use names like IN01, M00 or OUT11, a comma list, 'high' or 'all'"
            )
        if name in names:
            raise UsageError(f"target {word!r} is given twice")
        names.append(name)
    return names


def select(available: Mapping[str, Target], text: str) -> list[Target]:
    """The targets that a comma list of names, block names and group words selects, in running order.

    ``high`` is the finest attention level; ``IN07`` of a block with several layers selects them all.
    Raises UsageError if a name is not in this UNet or two entries select the same layer.
    """
    finest = min((t.downscale for t in available.values()), default=0)
    chosen: dict[str, str] = {}
    for word in parse_names(text):
        if word == "all":
            matches = list(available)
        elif word == "high":
            matches = [name for name, t in available.items() if t.downscale == finest]
        else:
            matches = [name for name in available if name == word or name.startswith(f"{word}.")]
        if not matches:
            raise UsageError(f"this UNet has no self-attention layer {word}; it has {', '.join(available)}")
        for name in matches:
            if name in chosen:
                raise UsageError(f"layer {name} is selected twice, by {chosen[name]!r} and {word!r}")
            chosen[name] = word
    return [t for name, t in available.items() if name in chosen]


def check_fit(targets: Mapping[str, Target], name: str, config: OperatorConfig) -> None:
    """Raises UsageError unless the operator that ``config`` describes can stand at target ``name``."""
    if name not in targets:
        raise UsageError(f"this UNet has no self-attention layer {name}; it has {', '.join(targets)}")
    target = targets[name]
    if config.dim != target.dim:
        raise UsageError(
            f"layer {name} has {target.dim} channels, but the operator has {config.dim}: it belongs to another "
            "architecture"
        )
    if config.form == "core" and config.inner != target.inner_dim:
        raise UsageError(
            f"layer {name} projects to {target.inner_dim} channels, but the core operator works on {config.inner}"
        )
