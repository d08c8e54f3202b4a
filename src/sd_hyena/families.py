"""Families of Stable Diffusion UNets: a new one is an entry of ``FAMILIES`` and its configs. Imports no torch."""

from __future__ import annotations

import inspect
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SdHyenaError
from .finite import first_not_finite, why_not_finite
from .long_prompts import warn_of_cut
from .texts import shortened

if TYPE_CHECKING:
    from torch import Tensor

DEMO = "demo"
DEMO_DIR = Path(__file__).parent / "demo" / "teacher"
CONFIGS = Path(__file__).parent / "configs"
VOCABULARY = DEMO_DIR / "tokenizer"  # of CLIP: all families use it
UNET = "model.diffusion_model."  # what names of its tensors begin with in a single file
AESTHETIC_SCORE = 6.0  # that SDXL's refiner is asked for, as its pipeline does
MASK_CHANNELS = 5  # that an inpainting UNet takes beside the latents: a mask, and what is seen around it
_CROSS_ATTENTION = re.compile(re.escape(UNET) + r"input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight")


@dataclass(frozen=True)
class Family:
    """Single files belong to it by the width of the text states and the number of channels their UNets take."""

    title: str
    configs: Path  # of its components, as in a diffusers folder
    text_width: int
    # Component -> what names of its tensors begin with in a single file; OpenCLIP's end in "model.".
    text_encoders: Mapping[str, str]
    pooled_width: int = 0  # of the pooled text its UNet takes too, with the picture's size; 0: it takes neither
    shared: Path | None = None  # where the components are that ``configs`` has not
    inpaints: bool = False
    pipeline: str = "StableDiffusionPipeline"  # class in diffusers
    # A tensor of the UNet whose values spread widely where it predicts v: nothing else in such files tells.
    v_mark: str = ""

    def config(self, component: str) -> dict[str, Any]:
        """What ``component``'s configuration says."""
        folder = self.configs / component
        if self.shared and not folder.is_dir():
            folder = self.shared / component
        (file,) = folder.glob("*config.json")
        config = json.loads(file.read_text())
        if component == "unet" and self.inpaints:
            config["in_channels"] += MASK_CHANNELS
        return config

    def index(self) -> dict[str, Any]:
        """What the pipeline's model_index.json says."""
        return json.loads((self.configs / "model_index.json").read_text())


_SD1, _SD2, _SDXL, _REFINER = (CONFIGS / name for name in ("sd1", "sd21", "sdxl", "sdxl_refiner"))
_CLIP = {"text_encoder": "cond_stage_model.transformer."}
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model."}
_BOTH = {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."}
_SECOND = {"text_encoder_2": "conditioner.embedders.0.model."}
_V_MARK = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
FAMILIES = {
    DEMO: Family("the bundled model", DEMO_DIR, 64, _CLIP),
    "sd15": Family("Stable Diffusion 1.x", _SD1, 768, _CLIP),
    "sd21": Family("Stable Diffusion 2.x", _SD2, 1024, _OPEN_CLIP, shared=_SD1, v_mark=_V_MARK),
    "sdxl": Family("SDXL", _SDXL, 2048, _BOTH, 1280, _SD1, pipeline="StableDiffusionXLPipeline"),
    "sdxl_refiner": Family(
        "SDXL's refiner", _REFINER, 1280, _SECOND, 1280, _SDXL, pipeline="StableDiffusionXLImg2ImgPipeline"
    ),
}
FAMILIES |= {
    f"{name}_inpainting": replace(
        FAMILIES[name], title=f"{FAMILIES[name].title} for inpainting", inpaints=True, pipeline=pipeline, v_mark=""
    )
    for name, pipeline in (
        ("sd15", "StableDiffusionInpaintPipeline"),
        ("sd21", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
    )
}
# What --random_weights takes: what draws from text alone.
ARCHITECTURES = tuple(
    name
    for name, family in FAMILIES.items()
    if name != DEMO and family.pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
)


def recognise(shapes: Mapping[str, Sequence[int]]) -> Family | None:
    """The family of a single file with tensors of these names and shapes; None if it is of none of them."""
    width = next((shape[-1] for name, shape in shapes.items() if shape and _CROSS_ATTENTION.fullmatch(name)), None)
    channels = dict(enumerate(shapes.get(f"{UNET}input_blocks.0.0.weight", ()))).get(1)
    for family in FAMILIES.values():
        if family.text_width == width and family.config("unet")["in_channels"] == channels:
            return family
    return None


def encode_prompt(pipe: Any, prompt: str) -> tuple[Tensor, ...]:
    """States with the prompt and with none, as the pipeline guides with; SDXL: then both pooled ones. On the CPU.

    All prompts have equally many tokens: what is beyond them is cut, and said. Raises SdHyenaError for states that are
    not finite."""
    warn_of_cut(pipe, prompt)
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    states = tuple(text.cpu() for text in pipe.encode_prompt(prompt, device=pipe.unet.device, **options))
    if first_not_finite(states):
        raise SdHyenaError(f"the text encoder's states of {shortened(prompt)!r} are not finite: {why_not_finite(pipe)}")
    return states


def from_text(pipe: Any, width: int, height: int) -> dict[str, Any]:
    """What a pipeline that paints over pictures takes beside prompts to draw from text alone, as other pipelines do:
    grey, all of which is to be painted over."""
    takes = inspect.signature(pipe.__call__).parameters
    if "strength" not in takes:
        return {}
    from PIL import Image

    inputs = {"image": Image.new("RGB", (width, height), (127, 127, 127)), "strength": 1.0}
    return inputs | ({"mask_image": Image.new("L", (width, height), 255)} if "mask_image" in takes else {})


def unet_call(pipe: Any, sample: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor | None = None) -> dict:
    """Keyword arguments of a UNet call; with pooled text (SDXL), also the picture's size as it would be drawn.

    For an inpainting UNet all of the picture is masked.
    """
    import torch

    device, dtype, config = pipe.unet.device, pipe.unet.dtype, pipe.unet.config
    if config.in_channels == sample.shape[1] + MASK_CHANNELS:
        seen = _grey_latent(pipe, sample.shape[-2], sample.shape[-1]).to(sample).expand(len(sample), -1, -1, -1)
        sample = torch.cat([sample, torch.ones_like(sample[:, :1]), seen], 1)
    call: dict[str, Any] = {"sample": sample.to(device, dtype), "timestep": timestep.to(device)}
    call["encoder_hidden_states"] = states.to(device, dtype)
    if pooled is not None:
        h, w = (side * pipe.vae_scale_factor for side in sample.shape[-2:])
        pooled = pooled.to(device, dtype)
        numbers = (config.projection_class_embeddings_input_dim - pooled.shape[1]) // config.addition_time_embed_dim
        size = [h, w, 0, 0, h, w] if numbers == 6 else [h, w, 0, 0, AESTHETIC_SCORE]
        call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": pooled.new_tensor([size] * len(pooled))}
    return call


_GREY: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], Tensor]] = weakref.WeakKeyDictionary()  # by VAE and size


def _grey_latent(pipe: Any, h: int, w: int) -> Tensor:
    """(1, C, h, w): what an inpainting UNet sees around a mask that covers all."""
    import torch

    known = _GREY.setdefault(pipe.vae, {})
    if (h, w) not in known:
        vae = pipe.vae
        grey = torch.zeros(1, 3, h * pipe.vae_scale_factor, w * pipe.vae_scale_factor)
        with torch.no_grad():
            mean = vae.encode(grey.to(vae.device, vae.dtype)).latent_dist.mean
        known[h, w] = (mean * vae.config.scaling_factor).float().cpu()
    return known[h, w]
