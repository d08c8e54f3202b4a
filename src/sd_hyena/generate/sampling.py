"""Drawing with a pipeline: every picture from its own prompt and seed, and none from numbers that are not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import SdHyenaError
from ..families import from_text
from ..finite import is_finite, why_not_finite
from ..long_prompts import count, encode_parts


class NotFiniteError(SdHyenaError):
    """Drawing came to NaN or infinity; the message says where, and what to do."""


def sample(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Image.Image]:
    """One picture per prompt, of any length; picture i depends on prompt i and seed i alone, not on its batch.

    ``options`` go to the pipeline; those that are lists, such as ``negative_prompt``, have one value per prompt.
    Raises NotFiniteError.
    """
    return sample_latents(pipe, prompts, seeds, **options)[0]


def sample_latents(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> tuple[list[Image.Image], Tensor]:
    """What :func:`sample` returns, and the latents (N, C, h, w) that the pictures were decoded from."""
    if "image" not in options:
        options |= from_text(pipe, options.get("width", 512), options.get("height", 512))
    negatives = options.get("negative_prompt") or [""] * len(prompts)
    parts = [count(pipe, *pair) for pair in zip(prompts, negatives, strict=True)]
    images: dict[int, Image.Image] = {}
    latents: dict[int, Tensor] = {}
    for size in sorted(set(parts)):  # those that are alike are drawn together
        rows = [i for i, n in enumerate(parts) if n == size]
        call = {name: [v[i] for i in rows] if isinstance(v, list) else v for name, v in options.items()}
        call["prompt"] = [prompts[i] for i in rows]
        if size > 1:
            call |= encode_parts(pipe, call.pop("prompt"), call.pop("negative_prompt", None), size)
        kept: dict[str, Tensor] = {}
        generators = [torch.Generator().manual_seed(seeds[i]) for i in rows]
        with _finite_decoder(pipe):
            drawn = pipe(**call, generator=generators, callback_on_step_end=_keep_finite(kept)).images
        images |= zip(rows, drawn, strict=True)
        latents |= zip(rows, kept["latents"], strict=True)
    order = range(len(prompts))
    return [images[i] for i in order], torch.stack([latents[i] for i in order])


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
