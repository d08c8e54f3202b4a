"""Finding and loading teachers: the bundled model, a diffusers folder, a single file, a hub id.

This is one of the few places that import diffusers.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SdHyenaError, UsageError
from .families import DEMO, DEMO_DIR, FAMILIES, Family, recognise

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SINGLE_FILE = (".safetensors", ".ckpt")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: ``kind`` is "folder", "file" or "hub"; ``name`` is what the user typed."""

    name: str
    kind: str
    location: str

    @property
    def is_demo(self) -> bool:
        """Whether this is the bundled model, asked for by its name."""
        return self.name == DEMO


def locate(name: str) -> ModelSource:
    """Raises UsageError if ``name`` is neither the bundled model, something on disk, nor shaped like a hub id."""
    if name == DEMO:
        return ModelSource(name, "folder", str(DEMO_DIR))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UsageError(f"model {name}: the folder has no model_index.json, so it is not a diffusers pipeline")
        return ModelSource(name, "folder", str(path))
    if path.is_file():
        if path.suffix.lower() not in _SINGLE_FILE:
            raise UsageError(f"model {name}: a single-file checkpoint ends in .safetensors or .ckpt")
        return ModelSource(name, "file", str(path))
    if path.suffix.lower() in _SINGLE_FILE or not _HUB_ID.fullmatch(name):
        raise UsageError(
            f"model {name} not found: give demo, a diffusers folder, a .safetensors or .ckpt file, or a hub id"
        )
    return ModelSource(name, "hub", name)


def size_defaults(model: str) -> dict[str, int]:
    """Width and height, in px, of a run that names none, where they differ from 512: the bundled model's."""
    if model != DEMO:
        return {}
    return dict.fromkeys(("width", "height"), FAMILIES[DEMO].config("unet")["sample_size"] * 8)


def unet_skeleton(source: ModelSource) -> torch.nn.Module | None:
    """The UNet without weights, for checking targets and sizes early; None if only loading can tell."""
    folder = Path(source.location)
    if source.kind == "file":
        family = _family(folder)
        if family is None or family.tokenizer is None:
            return None
        folder = family.configs
    elif source.kind == "hub":
        return None
    import torch
    from diffusers import UNet2DConditionModel

    try:
        config = json.loads((folder / "unet" / "config.json").read_text())
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (OSError, ValueError, TypeError) as error:
        raise SdHyenaError(f"model {source.name}: its UNet's config.json cannot be used: {error}") from None


def load_pipeline(source: ModelSource, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A Stable Diffusion pipeline in evaluation mode, without a safety checker.

    Single files of families with a tokenizer in this package load offline, with its component configs; other
    families' configs come from the hub. Raises SdHyenaError if the model cannot be loaded.
    """
    import torch

    quiet_libraries()
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    try:
        if source.kind == "file":
            pipe = _load_single_file(source, options)
        else:
            local = source.kind == "folder"
            pipe = DiffusionPipeline.from_pretrained(source.location, local_files_only=local, **options)
    except SdHyenaError:
        raise
    except Exception as error:  # diffusers, transformers and the hub raise many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise SdHyenaError(f"model {source.name}: cannot be loaded: {reason}") from error
    if not hasattr(pipe, "unet"):
        raise UsageError(f"model {source.name}: {type(pipe).__name__} has no UNet")
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae):
        module.eval().requires_grad_(False)
    return pipe.to(device)


def quiet_libraries() -> None:
    """Stops diffusers' and transformers' own progress bars and advice; errors still reach the user."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _load_single_file(source: ModelSource, options: dict[str, Any]) -> Any:
    import diffusers
    from transformers import CLIPTokenizer

    family = _family(Path(source.location))
    if family and family.tokenizer:
        options |= {"config": str(family.configs), "local_files_only": True}
        options["tokenizer"] = CLIPTokenizer.from_pretrained(family.tokenizer, local_files_only=True)
    else:
        logger.info("%s: no configs for this family in this package; they are taken from the hub", source.name)
    return getattr(diffusers, (family or Family).pipeline).from_single_file(source.location, **options)


def single_file_family(source: ModelSource) -> Family:
    f = _family(Path(source.location))
    assert f
    return f


def _family(path: Path) -> Family | None:
    """Which family a single file is of; None if it cannot be told.

    A ``.ckpt`` is a pickle and is left to diffusers, which loads it with ``weights_only``; it is taken for
    SD1.x, the family that was distributed that way.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() == ".ckpt":
        return FAMILIES["sd15"]
    try:
        with safe_open(path, framework="pt") as file:
            return recognise({name: file.get_slice(name).get_shape() for name in list(file.keys())})
    except (SafetensorError, OSError) as error:
        raise SdHyenaError(f"model {path}: not a readable safetensors file ({error})") from None


def check_size(name: str, width: int, height: int, factor: int = 8) -> None:
    """Raises UsageError unless a model can draw a ``width`` x ``height`` px image.

    Any multiple of the VAE factor works: where a grid side is odd, diffusers passes the upsampling size.
    """
    for label, value in (("width", width), ("height", height)):
        if value <= 0 or value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UsageError(f"{label} {value} px: model {name} needs a positive multiple of {factor}, such as {near}")
        if value > 16384:
            raise UsageError(f"{label} {value} px: the largest supported size is 16384")


def random_pipeline(architecture: str, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, dict]:
    """An untrained pipeline of one of ``ARCHITECTURES``, built from its configuration alone.

    It has no text encoder: returns the pipeline and the random text states to call it with, for one prompt.
    """
    import diffusers
    import torch

    quiet_libraries()
    family = FAMILIES[architecture]
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(family.config("unet"))
        vae = diffusers.AutoencoderKL.from_config(FAMILIES["sd15"].config("vae"))  # all are built like this one
    for model in (unet, vae):
        model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # keeps activations at their size; norms start as the identity
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    kind = getattr(diffusers, family.pipeline)
    parts = {name: None for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty}
    parts |= {"unet": unet, "vae": vae, "scheduler": diffusers.EulerDiscreteScheduler()}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    text = {name: torch.randn(1, 77, family.text_width, **like) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if family.pooled_width:
        pooled = torch.randn(1, family.pooled_width, **like)
        text |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    return pipe, text
