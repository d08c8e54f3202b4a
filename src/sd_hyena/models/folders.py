"""diffusers folders: what is in them, which variant of the weights to take, and the pipeline they hold.

No code from a folder is ever run: all its parts must be classes of diffusers and transformers.
"""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import strict_json
from ..errors import CheckpointError, UsageError
from ..texts import reason
from .configs import read_json
from .parts import check_scheduler, check_tokenizer, check_weights, component_class
from .quiet import quiet_libraries

if TYPE_CHECKING:
    import torch

SAFETY = ("safety_checker", "feature_extractor")  # checks of drawn pictures: not loaded
# What stands for each kind of component; weights are looked for apart.
_NEEDED = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("vocab.json", "tokenizer.json"),
    "tokenizer_2": ("vocab.json", "tokenizer.json"),
}
_WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")
_TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_OTHERS = re.compile(r"Kolors|IF[A-Z]|Kandinsky")  # pipelines with a UNet of this class, and other text encoders
logger = logging.getLogger(__name__)


def check_folder(folder: Path, name: str, variant: str = "") -> str:
    """Looks into a folder and returns the variant of the weights to load.

    Raises UsageError if it is no pipeline with a UNet, brings code of its own, or has no such variant;
    CheckpointError if something that it should hold is missing or cannot be.
    """
    quiet_libraries()  # before a pipeline's class is looked at, which imports a good part of them
    index = read_index(folder, name)
    for component in ("vae", "scheduler", *_TEXT):
        if not index.get(component) and _is_needed(component, folder, name):
            raise UsageError(f"model {name}: its model_index.json names no {component}: give a whole pipeline")
    for component, kind in index.items():
        if kind is None or component in SAFETY:
            continue
        needed = _NEEDED.get(component, ("config.json",) if component in _WEIGHTED else ())
        if not (folder / component).is_dir():
            raise CheckpointError(f"model {name}: lacks the folder {component}/, which its model_index.json names")
        if needed and not any((folder / component / file).is_file() for file in needed):
            raise CheckpointError(f"model {name}: lacks {component}/{needed[0]}")
        for file in sorted((folder / component).glob("*.json")):
            if not file.name.endswith(".index.json"):
                read_json(file, name, f"{component}/")
        if component.startswith("tokenizer"):
            check_tokenizer(folder / component, name)
    for file in (folder / "pipeline.py", *(path for c in index for path in sorted((folder / c).glob("*.py")))):
        if file.exists():
            raise UsageError(
                f"model {name}: holds code of its own, {file.relative_to(folder)}, which is never run: take it out if "
                "the model can do without"
            )
    check_scheduler(folder, index["scheduler"], name)
    return choose_variant(folder, [c for c in _WEIGHTED if index.get(c)], name, variant)


def read_index(folder: Path, name: str) -> dict[str, str | None]:
    """Component -> its class, or None, by model_index.json. Raises UsageError for what cannot be used."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UsageError(f"model {name}: {_what_else(folder)}")
    content = read_json(path, name)
    kind = content.get("_class_name")
    parts = {c: v for c, v in content.items() if not c.startswith("_") and isinstance(v, list) and len(v) == 2}
    import diffusers

    cls = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not isinstance(cls, type):
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
        if not isinstance(class_name, str | None):
            raise CheckpointError(f"model {name}: model_index.json names no class for {component}")
    found: dict[str, str | None] = {component: class_name for component, (_, class_name) in parts.items()}
    from .kinds import SUPPORTED

    if _OTHERS.match(str(kind)):
        raise UsageError(f"model {name}: is a {kind}: sd-hyena works on {SUPPORTED}")
    if found.get("unet") != "UNet2DConditionModel":
        unet = f"whose UNet is a {found['unet']}" if found.get("unet") else "which has no UNet"
        raise UsageError(f"model {name}: is a {kind}, {unet}: sd-hyena works on {SUPPORTED}")
    if not issubclass(cls, diffusers.DiffusionPipeline):
        raise UsageError(f"model {name}: is a {kind}, which is no pipeline: sd-hyena works on {SUPPORTED}")
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


def load_folder(folder: Path, name: str, variant: str, dtype: torch.dtype) -> Any:
    """The pipeline, put together here: diffusers would look for code in the folder. Raises CheckpointError for weights
    that are damaged or do not fit their configuration."""
    import diffusers

    content, index = read_json(folder / "model_index.json", name), read_index(folder, name)
    kind = getattr(diffusers, content["_class_name"])
    for part in _WEIGHTED:
        class_name = index.get(part)
        if class_name:
            check_weights(folder / part, class_name, name, _chosen(folder / part, variant))
    given: dict[str, Any] = {}
    for part, parameter in inspect.signature(kind.__init__).parameters.items():
        if index.get(part) and part not in SAFETY:
            library, class_name = content[part]
            given[part] = _load(folder, part, component_class(class_name, part, name, library), name, variant, dtype)
        elif isinstance(content.get(part), bool):
            given[part] = content[part]
        elif parameter.default is parameter.empty and part != "self":
            given[part] = None
    try:
        return kind(**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"model {name}: its parts do not make a {kind.__name__}: {reason(error)}") from None


def _load(folder: Path, part: str, kind: Any, name: str, variant: str, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"local_files_only": True}
    if hasattr(kind, "named_parameters"):
        options |= {"variant": _chosen(folder / part, variant) or None, "dtype": dtype}
    if kind.__module__.startswith("transformers"):
        options["trust_remote_code"] = False  # else it may ask whoever sits at the terminal
    try:
        return kind.from_pretrained(folder / part, **options)
    except Exception as error:  # diffusers and transformers raise many unrelated types
        raise CheckpointError(f"model {name}: {part}/ cannot be loaded: {reason(error)}") from error


def _chosen(folder: Path, variant: str) -> str:
    """The variant of one component, which may have plain weights alone."""
    from ..tensors import weights_in

    return variant if variant in weights_in(folder) else ""


def _is_needed(component: str, folder: Path, name: str) -> bool:
    """Whether the pipeline cannot do without it. SDXL's refiner has a second text encoder alone."""
    import diffusers

    kind = getattr(diffusers, read_json(folder / "model_index.json", name)["_class_name"])
    takes = inspect.signature(kind.__init__).parameters
    if component not in takes or component in SAFETY:
        return False
    if component not in ("text_encoder", "tokenizer") or "text_encoder_2" not in takes:
        return True
    widths = []
    for part, key in (("unet", "cross_attention_dim"), ("text_encoder_2", "hidden_size")):
        path = folder / part / "config.json"
        widths.append(read_json(path, name, f"{part}/").get(key) if path.is_file() else part)
    return widths[0] != widths[1]


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
            content = strict_json.load(config)
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
