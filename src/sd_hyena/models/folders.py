"""diffusers folders: what is in them, which variant of the weights to take, and the pipeline they hold.

No code from a folder is ever run: all its parts must be classes of diffusers and transformers.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError

SAFETY = ("safety_checker", "feature_extractor")  # checks of drawn pictures: not loaded
# What stands for each kind of component; weights are looked for apart.
_NEEDED = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("vocab.json", "tokenizer.json"),
    "tokenizer_2": ("vocab.json", "tokenizer.json"),
}
_WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")
logger = logging.getLogger(__name__)


def check_folder(folder: Path, name: str, variant: str = "") -> str:
    """Looks into a folder and returns the variant of the weights to load.

    Raises UsageError if it is no pipeline with a UNet, would run code of its own, or has no such variant;
    CheckpointError if something that it should hold is missing.
    """
    index = read_index(folder, name)
    for component in ("vae", "scheduler"):
        if not index.get(component):
            raise UsageError(f"model {name}: its model_index.json names no {component}: give a whole pipeline")
    for component, kind in index.items():
        if kind is None or component in SAFETY:
            continue
        needed = _NEEDED.get(component, ("config.json",) if component in _WEIGHTED else ())
        if not (folder / component).is_dir():
            raise CheckpointError(f"model {name}: lacks the folder {component}/, which its model_index.json names")
        if needed and not any((folder / component / file).is_file() for file in needed):
            raise CheckpointError(f"model {name}: lacks {component}/{needed[0]}")
    return choose_variant(folder, [c for c in _WEIGHTED if index.get(c)], name, variant)


def read_index(folder: Path, name: str) -> dict[str, str | None]:
    """Component -> its class, or None, by model_index.json. Raises UsageError for what cannot be used."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UsageError(f"model {name}: {_what_else(folder)}")
    content = _read_json(path, name)
    kind = content.get("_class_name")
    parts = {c: v for c, v in content.items() if not c.startswith("_") and isinstance(v, list) and len(v) == 2}
    import diffusers

    if not isinstance(kind, str) or kind not in dir(diffusers):
        raise UsageError(
            f"model {name}: its pipeline {kind!r} is not one of diffusers', and code in a folder is not run"
        )
    for component, (library, class_name) in parts.items():
        own = library in ("diffusers", "transformers") or library in dir(diffusers.pipelines)
        if library is not None and (not own or (folder / component / f"{library}.py").exists()):
            raise UsageError(
                f"model {name}: its {component} is {library}.{class_name}, no class of diffusers or transformers, and "
                "code in a folder is not run"
            )
    found = {component: class_name for component, (_, class_name) in parts.items()}
    if found.get("unet") != "UNet2DConditionModel":
        from .kinds import SUPPORTED

        unet = f"whose UNet is a {found['unet']}" if found.get("unet") else "which has no UNet"
        raise UsageError(f"model {name}: is a {kind}, {unet}: sd-hyena works on {SUPPORTED}")
    return found


def choose_variant(folder: Path, components: list[str], name: str, variant: str) -> str:
    """``variant`` if there are such weights; without one the plain weights, or where those are missing the variant
    that is there. Raises UsageError or CheckpointError."""
    from ..tensors import weights_in

    there = {component: set(weights_in(folder / component)) for component in components}
    for component, variants in there.items():
        if not variants:
            raise CheckpointError(f"model {name}: holds no weights in {component}/ (.safetensors or .bin)")
    named = sorted(set().union(*there.values()) - {""})
    if variant:
        if variant not in named:
            has = f"it has {', '.join(named)}" if named else "it has plain weights only: leave --variant out"
            raise UsageError(f"model {name}: has no weights of variant {variant}; {has}")
        lacking = [component for component, variants in there.items() if not variants & {"", variant}]
    else:
        lacking = [component for component, variants in there.items() if "" not in variants]
        if lacking:
            usable = [v for v in sorted(named, key=lambda v: v != "fp16") if all(v in there[c] for c in lacking)]
            if usable:
                logger.info("model %s: plain weights are missing, those of variant %s are taken", name, usable[0])
                return usable[0]
    if lacking:
        raise UsageError(
            f"model {name}: {lacking[0]}/ has weights of variant {', '.join(sorted(there[lacking[0]]))} only: choose "
            "with --variant"
        )
    return variant


def load_folder(folder: Path, name: str, variant: str, options: dict[str, Any]) -> Any:
    """The pipeline. Raises CheckpointError for weights that are damaged or do not fit their configuration."""
    import diffusers

    from ..tensors import open_tensors, weights_in

    index = read_index(folder, name)
    for component in [c for c in _WEIGHTED if index.get(c)]:
        chosen = variant if variant in weights_in(folder / component) else ""
        held = open_tensors(folder / component, chosen)
        if component == "unet":
            missing = [key for key in unet_from_config(folder, name).state_dict() if key not in held]
            if missing:
                raise CheckpointError(
                    f"model {name}: its unet lacks {', '.join(missing[:2])}: download or copy it again"
                )
    absent = {part: None for part in SAFETY if part in index}
    return diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, variant=variant or None, **absent, **options
    )


def unet_from_config(folder: Path, name: str) -> Any:
    """The UNet of a folder, without weights. Raises CheckpointError if its configuration cannot be used."""
    import torch
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(_read_json(folder / "unet" / "config.json", name))
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"model {name}: its UNet's config.json cannot be used: {reason}") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model {name}: {path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"model {name}: {path.name} is not a JSON object")
    return content


def _what_else(folder: Path) -> str:
    """What a folder without a model_index.json is, and what to do."""
    whole = "give the folder of the whole pipeline, the one with model_index.json"
    if (folder / "hyena.safetensors").is_file():
        return "is a folder of Hyena layers: give it with -y/--hyena, and the model they are for with -m"
    if (folder / "adapter_config.json").is_file():
        return f"is a folder of a peft adapter: {whole}"
    config = folder / "config.json"
    if config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            kind = content.get("_class_name") or (content.get("architectures") or ["model"])[0]
        except (OSError, ValueError, AttributeError, TypeError, LookupError):
            kind = "model"
        return f"is a folder of a {kind} alone: {whole}"
    parts = [part for part in _WEIGHTED if (folder / part).is_dir()]
    if parts:
        return f"the folder has {', '.join(f'{part}/' for part in parts)} but no model_index.json: {whole}"
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".safetensors", ".ckpt"))
    if files:
        return f"the folder has no model_index.json; if you mean the single file in it, give {folder / files[0]}"
    return "the folder has no model_index.json, so it is not a diffusers pipeline"
