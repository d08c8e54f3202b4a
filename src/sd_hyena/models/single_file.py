"""Single files: which family they are of, and the pipeline they hold. Works offline, and runs no code of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..families import FAMILIES, UNET, VOCABULARY, Family, recognise
from ..tensors import Tensors, open_tensors
from .kinds import QUANTISED, SUPPORTED, kind_of
from .ldm import VAE, ldm_names

# Channels that a UNet takes in other models made from Stable Diffusion.
_RELATIVES = {5: "a depth-to-image", 7: "an upscaling", 8: "an InstructPix2Pix"}


@dataclass
class Checkpoint:
    """A single file, opened. ``names``: in LDM's numbering -> in the file."""

    name: str
    tensors: Tensors
    names: dict[str, str]
    family: Family

    def text_prefix(self, component: str) -> str:
        """What names of a text encoder begin with: an OpenCLIP one may be saved as transformers has it."""
        usual = self.family.text_encoders[component]
        other = f"{usual.removesuffix('model.')}transformer."
        return usual if any(ldm.startswith(usual) for ldm in self.names) else other

    def part(self, *prefixes: str) -> dict[str, Tensor]:
        """The tensors whose names begin with one of ``prefixes``, as they are stored."""
        return {ldm: self.tensors.get(name) for ldm, name in self.names.items() if ldm.startswith(prefixes)}


def open_checkpoint(path: Path | str, name: str, whole: bool = True) -> Checkpoint:
    """Reads names and shapes, and tells the family.

    Raises UsageError if the file is something else than a checkpoint with all its parts, or unless ``whole`` with a
    UNet in LDM's numbering; CheckpointError if it is damaged.
    """
    tensors = open_tensors(path)
    names = ldm_names(tensors)
    kind = kind_of(names, tensors.metadata, whole)
    packed = (torch.int8, torch.uint8)
    if kind is None and any(tensors.dtypes[n] in packed for ldm, n in names.items() if ldm.startswith(UNET)):
        kind = QUANTISED
    if kind is not None:
        raise UsageError(f"model {name}: is {kind.what}: {kind.remedy}")
    shapes = {ldm: tensors.shapes[stored] for ldm, stored in names.items()}
    if not any(ldm.startswith(UNET) for ldm in shapes):
        first = ", ".join(list(tensors)[:3])
        raise UsageError(f"model {name}: is no Stable Diffusion checkpoint (it holds {first} ...)")
    family = recognise(shapes)
    takes_pictures = family is not None and not family.pooled_width and f"{UNET}label_emb.0.0.weight" in shapes
    if family is None or takes_pictures:
        channels = dict(enumerate(shapes.get(f"{UNET}input_blocks.0.0.weight", ()))).get(1)
        what = "an unCLIP" if takes_pictures else _RELATIVES.get(channels or 0, "another")
        raise UsageError(f"model {name}: is {what} model, and sd-hyena works on {SUPPORTED}")
    if family.text_width == FAMILIES["sdxl"].text_width and _is_pruned(family, shapes):
        raise UsageError(f"model {name}: is a pruned SDXL, such as SSD-1B or Vega, and sd-hyena works on {SUPPORTED}")
    checkpoint = Checkpoint(name, tensors, names, family)
    parts = {"VAE": VAE} | {
        c.replace("_", " "): (prefix, checkpoint.text_prefix(c)) for c, prefix in family.text_encoders.items()
    }
    for part, prefixes in parts.items():
        if whole and not any(ldm.startswith(prefixes) for ldm in shapes):
            raise UsageError(
                f"model {name}: lacks its {part} (no tensors {prefixes[0]}...): give a whole checkpoint, or a "
                "diffusers folder with all parts"
            )
    return checkpoint


def _is_pruned(family: Family, shapes: Mapping[str, Any]) -> bool:
    """Whether the UNet has fewer transformer blocks at its deepest than SDXL's."""
    last = family.config("unet")["transformer_layers_per_block"][-1] - 1
    return not all(
        any(name.startswith(f"{UNET}{block}.1.transformer_blocks.{last}.") for name in shapes)
        for block in ("input_blocks.8", "middle_block")
    )


def load_single_file(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The pipeline, with the family's configurations and the bundled vocabulary.

    Raises CheckpointError if tensors are missing or do not fit the family.
    """
    import diffusers

    index = checkpoint.family.index()
    parts: dict[str, Any] = {name: value for name, value in index.items() if not name.startswith("_")}
    for component, value in parts.items():
        if isinstance(value, list):
            parts[component] = _component(checkpoint, component, value[1], dtype)
    return getattr(diffusers, checkpoint.family.pipeline)(**parts)


def _component(checkpoint: Checkpoint, component: str, kind: str | None, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    if kind is None:
        return None
    config = checkpoint.family.config(component)
    if component.startswith("tokenizer"):
        options = {key: value for key, value in config.items() if key != "tokenizer_class"}
        return transformers.CLIPTokenizer.from_pretrained(VOCABULARY, local_files_only=True, **options)
    if component == "scheduler":
        return getattr(diffusers, kind).from_config(config)
    with init_empty_weights(include_buffers=False):
        if component in checkpoint.family.text_encoders:
            model_class = getattr(transformers, kind)
            model = model_class(model_class.config_class(**config))
        else:
            model = getattr(diffusers, kind).from_config(config)
    label = f"model {checkpoint.name}: its {component.replace('_', ' ')}"
    # Text encoders come with parts that are of no use here; in a UNet whatever is not known changes what it does.
    _fill(model, _weights(checkpoint, component, config, model), dtype, label, strict=component == "unet")
    return model


def _weights(checkpoint: Checkpoint, component: str, config: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """A component's tensors under diffusers' and transformers' names."""
    from diffusers.loaders import single_file_utils as convert

    if component == "unet":
        part = checkpoint.part(UNET)
        state = convert.convert_ldm_unet_checkpoint(part, config)
        known = {id(tensor) for tensor in state.values()}  # the converter leaves out what it does not know
        return state | {name: t for name, t in part.items() if id(t) not in known and t.numel()}
    if component == "vae":
        return convert.convert_ldm_vae_checkpoint(checkpoint.part(*VAE), config)
    prefix = checkpoint.text_prefix(component)
    state = checkpoint.part(prefix)
    if prefix.endswith(".model."):
        projection = state.pop(f"{prefix}text_projection.weight", None)
        if projection is not None:  # as transformers has it, and not as OpenCLIP
            state[f"{prefix}text_projection"] = projection.T
        state = convert.convert_open_clip_checkpoint(model, state, prefix=prefix)
    else:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if not hasattr(model, "text_model"):  # as in transformers from 5.6 on
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return state


def _fill(model: torch.nn.Module, state: dict[str, Tensor], dtype: torch.dtype, label: str, strict: bool) -> None:
    """Gives an empty model its weights; with ``strict``, there may be no others."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    wrong = [name for name, tensor in expected.items() if name in state and state[name].shape != tensor.shape]
    extra = [name for name in state if name not in expected] if strict else []
    for problem, names in (("lacks", missing), ("has another shape of", wrong), ("has, unlike others,", extra)):
        if names:
            raise CheckpointError(f"{label} {problem} {', '.join(names[:2])}{' ...' if len(names) > 2 else ''}")
    used = {name: state[name].to(dtype) if state[name].is_floating_point() else state[name] for name in expected}
    model.load_state_dict(used, assign=True)
    model.eval()
