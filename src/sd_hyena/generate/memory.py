"""Where a pipeline's weights wait, and in how many pieces its VAE works, by what memory there is.

The estimates are of tensors that are held at once in one call of full-size models, with room to spare: what counts
is the order of magnitude.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..machine import free_memory
from .stages import Stage

logger = logging.getLogger(__name__)

# Values held at once: a UNet's for a latent pixel, in its finest width (its skip connections and one layer's own
# tensors: 44 on SDXL at 512 px); a VAE's for a pixel, in the width of its second finest level (3 on SD's, at its
# last but one).
_UNET_TENSORS, _VAE_TENSORS = 50, 3
_SHARE = 0.8  # of the free memory; the rest is for what libraries take


def check_offload(offload: str, device: str) -> None:
    """Raises UsageError for an offload from a CPU: weights are in main memory anyway."""
    if offload in ("model", "sequential") and device == "cpu":
        raise UsageError(f"--offload {offload} keeps weights off a GPU, and this runs on the CPU: leave it out")


def place(pipe: Any, device: str, offload: str, drawn: Sequence[Stage], count: int) -> str:
    """Puts the pipeline, which is on the CPU, where it will run, or its weights at hand; returns which offload it is.

    ``auto``: none on the CPU, elsewhere the quickest that has room for ``count`` pictures at a time.
    """
    if offload == "auto":
        offload = _roomiest(pipe, torch.device(device), drawn, count)
        if offload != "none":
            logger.info("GPU memory is short: weights wait in main memory (--offload %s)", offload)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    return offload


def spare_vae(pipe: Any, device: str, tiling: str, drawn: Sequence[Stage], count: int) -> None:
    """Has the VAE work in tiles if told to, or if the largest picture is too large for the memory that is free; or
    picture by picture if ``count`` of them are. Tiles overlap, but each is drawn without sight of the others.

    Raises UsageError if it is told to and cannot.
    """
    vae, largest = pipe.vae, max(drawn, key=lambda stage: stage.width * stage.height)
    if not hasattr(vae, "tile_sample_min_size") or "block_out_channels" not in vae.config:
        if tiling == "on":
            raise UsageError(f"--vae_tiling on: {type(vae).__name__} does not work in tiles")
        return
    needed, room = _vae_bytes(pipe, largest), _SHARE * free_memory(torch.device(device))
    tile = vae.tile_sample_min_size
    if tiled := tiling == "on" or (tiling == "auto" and needed > room and max(largest.width, largest.height) > tile):
        vae.enable_tiling()
        why = f": a whole picture takes {needed / 2**30:.1f} GiB, of {room / 2**30:.1f}" if needed > room else ""
        logger.info("the VAE works in tiles of %d px%s", tile, why)
    if tiled or count * needed > room:
        vae.enable_slicing()


def _roomiest(pipe: Any, device: torch.device, drawn: Sequence[Stage], count: int) -> str:
    if device.type != "cuda":
        return "none"
    room = _SHARE * free_memory(device)
    weights = [_weight_bytes(module) for module in pipe.components.values() if isinstance(module, nn.Module)]
    widths, item = pipe.unet.config.block_out_channels, pipe.unet.dtype.itemsize
    cells = max(stage.width * stage.height for stage in drawn) // pipe.vae_scale_factor**2
    working = _UNET_TENSORS * widths[0] * cells * 2 * count * item  # 2: with the prompt and without
    if sum(weights) + working <= room:
        return "none"
    return "model" if max(weights) + working <= room else "sequential"


def _weight_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _vae_bytes(pipe: Any, stage: Stage) -> int:
    upcast = hasattr(pipe, "upcast_vae") and pipe.vae.config.force_upcast  # SDXL's overflows in half precision
    item = 4 if upcast else pipe.vae.dtype.itemsize
    widths = pipe.vae.config.block_out_channels
    return _VAE_TENSORS * widths[min(1, len(widths) - 1)] * stage.width * stage.height * item
