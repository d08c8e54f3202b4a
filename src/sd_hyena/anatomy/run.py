"""Looking at a model: activations of its own at noised latents in bands of timesteps, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import patch
from ..distill.capture import capture
from ..errors import SdHyenaError, UsageError
from ..evaluate.inputs import HeldOut
from ..evaluate.pictures import draw
from ..finite import first_not_finite, why_not_finite
from ..machine import machine
from ..models import check_size
from ..settings import to_flags
from ..targets import find_targets, select
from .heads import ORACLES, Layer
from .settings import AnatomySettings

logger = logging.getLogger(__name__)


@dataclass
class LayerAnatomy:
    """What was found of one layer.

    ``bands``: of each timestep band the figures of :meth:`Layer.figures`; ``displacement``: (heads, 2 h - 1, 2 w - 1),
    the mean attention by displacement of key from query; ``queries``: how many of the cells were looked from.
    """

    name: str
    size: tuple[int, int]
    rank: int
    queries: int
    bands: list[dict[str, Any]]
    displacement: Tensor

    @property
    def cells(self) -> int:
        return self.size[0] * self.size[1]

    def head(self, name: str) -> list[float]:
        """A figure of each head, the mean over the bands."""
        columns = zip(*(band["heads"] for band in self.bands), strict=True)
        return [sum(head[name] for head in heads) / len(heads) for heads in columns]

    def head_error(self, oracle: str) -> list[float]:
        """What an oracle leaves of each head's part of the output, the mean over the bands."""
        columns = zip(*(band["heads"] for band in self.bands), strict=True)
        return [sum(head["errors"][oracle] for head in heads) / len(heads) for heads in columns]

    def mean(self, name: str) -> float:
        """A figure's mean over heads and bands."""
        values = self.head(name)
        return sum(values) / len(values)

    def error(self, oracle: str) -> float:
        """What an oracle leaves of the layer's output, the mean over the bands."""
        return sum(band["errors"][oracle] for band in self.bands) / len(self.bands)

    def record(self) -> dict[str, Any]:
        """Everything but the pictures, as plain numbers."""
        whole = {"errors": {oracle: self.error(oracle) for oracle in ORACLES}}
        return (
            {"layer": self.name, "grid": self.size, "rank": self.rank, "queries": self.queries}
            | whole
            | {"bands": self.bands}
        )


@dataclass
class Anatomy:
    """All that was found; ``bands`` are the first and last timestep of each."""

    settings: AnatomySettings
    bands: list[tuple[int, int]]
    layers: list[LayerAnatomy]
    machine: dict[str, Any]

    def command(self) -> str:
        """The command line that these settings came from, or could have."""
        return f"sd-hyena anatomy {to_flags(self.settings, omit=('overwrite',))}".strip()

    def record(self) -> dict[str, Any]:
        """What anatomy.json holds."""
        return {
            "machine": self.machine,
            "command": self.command(),
            "settings": asdict(self.settings),
            "bands": self.bands,
            "layers": [layer.record() for layer in self.layers],
        }


@torch.no_grad()
def examine(
    pipe: Any,
    settings: AnatomySettings,
    texts: Mapping[str, Tensor] | None = None,
    phase: Callable[[str], None] = logger.info,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Anatomy:
    """Examines the self-attention of the UNet in ``pipe``, LoRA weights on it included; the same pipeline and
    settings give the same figures.

    Args:
        pipe: any Stable Diffusion pipeline; no Hyena layer may be attached.
        settings: size, layers, bands and so on.
        texts: for a model without a text encoder, the text states to call it with as ``random_pipeline`` returns
            them; latents are then drawn at random too.
        phase: is told in a line what happens now; ``progress`` how many UNet calls or pictures of how many are done.

    Raises UsageError for a layer that the UNet lacks, a Hyena layer in it, or a size it cannot draw.
    """
    if patch.attached(pipe.unet):
        raise UsageError("Hyena layers are attached to this UNet: detach them to look at its attention")
    targets = select(find_targets(pipe.unet), settings.target)
    for target in targets:
        patch.check_replaceable(pipe.unet, target)
    check_size(settings.name, settings.width, settings.height, pipe.vae_scale_factor)
    prompts = settings.read_prompts()
    latents = _latents(pipe, settings, prompts, texts, phase, progress)
    states = None if texts is None else tuple(texts.values())
    inputs = HeldOut(pipe, latents, prompts, settings.bands, settings.samples, states)
    phase(f"looking at {len(targets)} layers in {settings.bands} bands of timesteps")
    found: dict[str, list[Layer]] = {target.name: [] for target in targets}
    with capture(pipe.unet, targets) as records:
        for number, batch in enumerate(inputs):
            conditional = {name: _first_half(value) for name, value in batch.call.items()}
            pipe.unet(**conditional)
            for target in targets:
                seen, layers = records.pop(target.name), found[target.name]
                if len(layers) == batch.band:
                    layers.append(Layer(target.heads, seen.size, settings.rank))
                try:
                    layers[-1].add(pipe.unet.get_submodule(target.path), seen.x)
                except torch.linalg.LinAlgError:  # it has no singular values
                    raise SdHyenaError(f"{target.name}: its attention is not finite: {why_not_finite(pipe)}") from None
            progress(number + 1, len(inputs))
    results = [
        LayerAnatomy(
            name,
            layers[0].size,
            layers[0].rank,
            len(layers[0].queries),
            [layer.figures() for layer in layers],
            sum(layer.displacement / layer.batches for layer in layers) / len(layers),
        )
        for name, layers in found.items()
    ]
    if name := first_not_finite({layer.name: layer.record() for layer in results}):
        raise SdHyenaError(f"{name} is not finite: {why_not_finite(pipe)}")
    return Anatomy(settings, inputs.edges, results, machine(str(pipe.unet.device)))


def _latents(
    pipe: Any,
    settings: AnatomySettings,
    prompts: list[str],
    texts: Mapping[str, Tensor] | None,
    phase: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Tensor:
    factor = pipe.vae_scale_factor
    if texts is not None:
        shape = len(prompts), pipe.unet.config.in_channels, settings.height // factor, settings.width // factor
        return torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
    phase(f"drawing {len(prompts)} pictures to look at")
    options: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.cfg_scale}
    options |= {"width": settings.width, "height": settings.height}
    return draw(pipe, prompts, range(settings.seed, settings.seed + len(prompts)), progress, **options).latents


def _first_half(value: Any) -> Any:
    """Of a batch with the prompts and then without, those with."""
    if isinstance(value, dict):
        return {name: _first_half(each) for name, each in value.items()}
    return value[: len(value) // 2]
