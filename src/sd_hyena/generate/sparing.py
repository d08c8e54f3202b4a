"""Drawing again, from the same seeds, with less memory, where it has run out.

What changes nothing in a picture comes first. Slices of attention and weights that wait in main memory change it by
rounding. Tiles of the VAE are each drawn without sight of the others, and the larger they are the less it shows: on the
bundled model at 256 px two by two of half its size are 45 dB from the whole (PSNR), those of a quarter 39; how far they
overlap hardly matters.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from torch import nn

from ..errors import OutOfMemory, is_out_of_memory
from ..machine import let_go
from ..placement import device_of

# Attention in slices computes what these do; other processors do something of their own, and stay.
_PLAIN = ("AttnProcessor", "AttnProcessor2_0")
_GRAIN, _SMALLEST = 32, 64  # px: tiles that overlap by a quarter in whole latent pixels; tiles that still see something
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Sparing:
    """Draws with a pipeline; each time that memory runs out, one more thing is done to save some, for all that is drawn
    from then on: one picture at a time, attention in slices, the VAE in tiles, weights in main memory (where they are
    on a GPU, and with ``offload``). Each is logged once.

    Within a ``with`` block: at its end the pipeline is as it was.
    """

    def __init__(self, pipe: Any, offload: bool = True) -> None:
        self.pipe = pipe
        self.singly = self.sliced = False
        self._left = [self._one_by_one, self._in_slices, self._in_tiles, *([self._offloaded] if offload else [])]
        self._left.append(self._whole_again)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def draw(self, rows: Sequence[int], pixels: int, call: Callable[[Sequence[int]], Sequence[Result]]) -> list[Result]:
        """What ``call`` returns for ``rows``, one each, called with as many of them as there is room for; ``pixels``:
        the longer side of a picture. Raises OutOfMemory if nothing helps."""
        done: list[Result] = []
        while len(done) < len(rows):
            now = rows[len(done) :][: 1 if self.singly else None]
            failure = None
            try:
                with self._slices():
                    done += call(now)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
            if failure is not None:
                self._save(failure, len(now), pixels)
        return done

    def _save(self, failure: Exception, count: int, pixels: int) -> None:
        let_go(failure)
        while self._left:
            if said := self._left.pop(0)(count, pixels):
                logger.warning("out of memory: drawing again with %s, from here on", said)
                return
        more = ", or give --offload sequential" if _has_own_memory(device_of(self.pipe.unet)) else ""
        raise OutOfMemory(
            f"out of memory for a single picture {pixels} px long: lower --width and --height, or --hires{more}"
        ) from failure

    def _one_by_one(self, count: int, pixels: int) -> str:
        self.singly = True
        return "one picture at a time" if count > 1 else ""

    def _in_slices(self, count: int, pixels: int) -> str:
        self.sliced = any(True for _ in _plain_attention(self.pipe.unet))
        return "attention in slices" if self.sliced else ""

    def _in_tiles(self, count: int, pixels: int) -> str:
        vae = self.pipe.vae
        names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
        if not all(hasattr(vae, name) for name in names):
            return ""
        largest = vae.tile_sample_min_size // (2 if vae.use_tiling else 1)
        size = max(_SMALLEST, min(largest, -(-pixels // 2 // _GRAIN) * _GRAIN))
        if size >= pixels:
            return ""
        for name in names:
            self._undo.callback(setattr, vae, name, getattr(vae, name))
        vae.use_tiling, vae.tile_sample_min_size = True, size
        vae.tile_latent_min_size = size // self.pipe.vae_scale_factor
        return f"the VAE in tiles of {size} px"

    def _offloaded(self, count: int, pixels: int) -> str:
        device = device_of(self.pipe.unet)
        modules = [module for module in self.pipe.components.values() if isinstance(module, nn.Module)]
        if not _has_own_memory(device) or any(hasattr(part, "_hf_hook") for m in modules for part in m.modules()):
            return ""
        try:
            self.pipe.enable_model_cpu_offload(device=device)
        except ValueError:  # a host has other arrangements
            return ""
        self._undo.callback(self._back, device)
        return "weights in main memory (--offload model)"

    def _whole_again(self, count: int, pixels: int) -> str:
        """Where attention needs no memory for its scores, slices, which write them down, cost more than they save."""
        sliced, self.sliced = self.sliced, False
        return "whole attention, as slices did not help" if sliced else ""

    def _back(self, device: Any) -> None:
        self.pipe.remove_all_hooks()
        try:
            self.pipe.to(device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.pipe.to("cpu")
            let_go(error)
            logger.warning("the pipeline's weights are left in main memory: %s has no room for them", device)

    @contextlib.contextmanager
    def _slices(self) -> Iterator[None]:
        """Within, attention is in slices if it is to be. Hyena layers stay; what they replace is sliced too."""
        found = list(_plain_attention(self.pipe.unet)) if self.sliced else []
        try:
            for attention, _ in found:
                attention.set_attention_slice(1)
            yield
        finally:
            for attention, processor in found:
                attention.set_processor(processor)


def _plain_attention(unet: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Attention layers that can be sliced, and their processors."""
    for module in unet.modules():
        if hasattr(module, "set_attention_slice") and hasattr(module, "get_processor"):
            processor: Any = module.get_processor()
            if type(processor).__name__ in _PLAIN:
                yield module, processor


def _has_own_memory(device: Any) -> bool:
    return device.type == "cuda"
