"""Drawing with a pipeline: every picture from its own prompt and seed, and none from numbers that are not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import SdHyenaError
from ..families import from_text
from ..finite import is_finite, why_not_finite
from ..long_prompts import count, encode_parts
from .sparing import Sparing


class NotFiniteError(SdHyenaError):
    """Drawing came to NaN or infinity; the message says where, and what to do."""


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sparing: Sparing | None = None, **options: Any
) -> list[Image.Image]:
    """One picture per prompt, of any length; picture i depends on prompt i and seed i alone, not on its batch.

    ``options`` go to the pipeline; those that are lists, such as ``negative_prompt``, have one value per prompt.
    ``sparing`` keeps what was done to save memory for what is drawn later; without one it is undone afterwards.
    Raises NotFiniteError, and OutOfMemory.
    """
    return sample_latents(pipe, prompts, seeds, sparing, **options)[0]


def sample_latents(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sparing: Sparing | None = None, **options: Any
) -> tuple[list[Image.Image], Tensor]:
    """What :func:`sample` returns, and the latents (N, C, h, w) that the pictures were decoded from."""
    if sparing is None:
        with Sparing(pipe) as own:
            return sample_latents(pipe, prompts, seeds, own, **options)
    if "image" not in options:
        options |= from_text(pipe, options.get("width", 512), options.get("height", 512))
    negatives = options.get("negative_prompt") or [""] * len(prompts)
    parts = [count(pipe, *pair) for pair in zip(prompts, negatives, strict=True)]
    drawn: dict[int, tuple[Image.Image, Tensor]] = {}
    for size in sorted(set(parts)):  # those that are alike are drawn together

        def draw(rows: Sequence[int], size: int = size) -> list[tuple[Image.Image, Tensor]]:
            call = {name: [v[i] for i in rows] if isinstance(v, list) else v for name, v in options.items()}
            call["prompt"] = [prompts[i] for i in rows]
            if size > 1:
                call |= encode_parts(pipe, call.pop("prompt"), call.pop("negative_prompt", None), size)
            kept: dict[str, Tensor] = {}
            generators = [torch.Generator().manual_seed(seeds[i]) for i in rows]
            with _finite_decoder(pipe):
                images = pipe(**call, generator=generators, callback_on_step_end=_keep_finite(kept)).images
            return list(zip(images, kept["latents"], strict=True))

        rows = [i for i, n in enumerate(parts) if n == size]
        drawn |= zip(rows, sparing.draw(rows, _longer_side(pipe, options), draw), strict=True)
    images, latents = zip(*(drawn[i] for i in range(len(prompts))), strict=True)
    return list(images), torch.stack(latents)


def _longer_side(pipe: Any, options: Mapping[str, Any]) -> int:
    """Of the pictures that are drawn, in px."""
    if "image" in options:
        image = options["image"]
        return max((image[0] if isinstance(image, list) else image).size)
    return max(
        options.get(side) or pipe.unet.config.sample_size * pipe.vae_scale_factor for side in ("width", "height")
    )


def _keep_finite(kept: dict[str, Tensor]) -> Any:
    """A callback for each step's end: keeps the latents in ``kept``, and stops at the first that are not finite."""

    def check(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.update(tensors)
        if not is_finite(tensors["latents"]):
            order = pipe.scheduler.order  # calls of the UNet a step
            where = f"step {step // order + 1} of {-(-pipe.num_timesteps // order)}"
            raise NotFiniteError(f"{where}: the latents are not finite: {why_not_finite(pipe)}")
        return tensors

    return check


@contextlib.contextmanager
def _finite_decoder(pipe: Any) -> Iterator[None]:
    """Checks what the VAE decodes too: in half precision some overflow where the latents did not."""

    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not is_finite(output):
            raise NotFiniteError(f"after the last step: the VAE's picture is not finite: {why_not_finite(pipe)}")

    decoder = getattr(pipe.vae, "decoder", None)
    if decoder is None:
        yield
        return
    handle = decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
