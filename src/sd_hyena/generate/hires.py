"""Drawing in stages: at the native size, then over the enlarged picture.

The picture is enlarged in pixels (Lanczos) and encoded again. Enlarged latents, which save that, are no picture: edges
come out as steps of eight pixels, and only so much noise as changes the picture hides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import UsageError
from .samplers import fit
from .sampling import sample
from .settings import GenerateSettings
from .sparing import Sparing
from .stages import HIRES, Stage, active_range, stages
from .switching import hyena_range


def pipelines(pipe: Any, settings: GenerateSettings) -> list[tuple[Stage, Any]]:
    """The stages and what draws each; all share the modules of ``pipe``, Hyena layers among them.

    Raises UsageError if there is no image-to-image form of the pipeline.
    """
    return [
        (stage, pipe if stage.name != HIRES else _image_to_image(pipe, stage, settings)) for stage in stages(settings)
    ]


def draw_stages(
    plan: Sequence[tuple[Stage, Any]],
    settings: GenerateSettings,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sparing: Sparing | None = None,
) -> list[Image.Image]:
    """One finished picture per prompt and seed; each depends on its own alone."""
    start, end = active_range(settings.hyena_range)
    images: list[Image.Image] = []
    for stage, pipe in plan:
        options: dict[str, Any] = {"num_inference_steps": stage.schedule, "guidance_scale": settings.cfg_scale}
        if stage.name == HIRES:
            size = (stage.width, stage.height)
            options |= {"image": [i.resize(size, Image.Resampling.LANCZOS) for i in images], "strength": stage.strength}
        else:
            options |= {"width": stage.width, "height": stage.height}
        with hyena_range(pipe, start, end if stage.hyena else start):
            negatives = [settings.negative_prompt] * len(seeds)
            images = sample(pipe, prompts, seeds, sparing, negative_prompt=negatives, **options)
    return images


def _image_to_image(pipe: Any, stage: Stage, settings: GenerateSettings) -> Any:
    from diffusers import AutoPipelineForImage2Image

    try:
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError
        other = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError:
        raise UsageError(f"--hires: {type(pipe).__name__} has no form that draws over a picture") from None
    if stage.schedule != settings.steps:
        other.scheduler = fit(
            type(pipe.scheduler).from_config(pipe.scheduler.config), stage.schedule, settings.scheduler
        )
    other.set_progress_bar_config(disable=True)
    return other
