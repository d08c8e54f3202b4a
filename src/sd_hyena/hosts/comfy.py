"""Hyena layers in ComfyUI: an object patch on each ``attn1.forward``, and the operators as a model beside the UNet.

The forward is patched, not the module: ComfyUI looks for LoRA keys in the state dict of a UNet that its clones share,
so that a module put in a layer's place would hide that layer's weights from all of them. The operators are in a patcher
of their own, to be loaded, counted and offloaded by ComfyUI like any other model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import given_words
from ..errors import UsageError
from ..fingerprint import SAMPLE, distance, sample_of_attentions
from ..hyena_file import HyenaFile
from ..layer_choice import check_layer, choose_layers, names_of
from ..nn import Operator
from ..nn.teacher import projections_of
from ..placement import convert
from ..targets import GROUPS, SUPPORTED, Target, parse_names

KEY = "sd_hyena"  # of our models among a patcher's additional ones
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attached:
    """What :func:`attach` did. ``layers``: what computes each by now; ``left``: why others that were asked for are as
    they were; ``further``: how far the model's weights are from those of the layers' teacher, as in
    :func:`..fingerprint.distance`."""

    label: str
    layers: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    further: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.label}: {len(self.layers)} Hyena layers"]
        if self.further:
            lines.append(
                f"taught by another model: this one's weights differ, by {100 * self.further:.3g}% in a sample"
            )
        lines += [f"{name}: {what}" for name, what in self.layers.items()]
        lines += [f"{name}: as it was: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


class HyenaForward:
    """What stands in place of one ``attn1.forward``. Not a module: nothing of it is in the UNet's tree.

    Steps whose sigma is not in ``sigmas`` (above the first, up to the second), and calls that are more than plain
    self-attention over the whole grid, go to ``before``, the forward that was there. ``calls`` counts all by what
    became of them.
    """

    def __init__(
        self,
        target: Target,
        operator: Operator,
        attention: nn.Module,
        before: Any = None,
        sigmas: tuple[float, float] | None = None,
    ) -> None:
        self.target, self.operator, self.attention = target, operator, attention
        self.before, self.sigmas = before, sigmas
        self.calls: Counter[str] = Counter()

    def __call__(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, mask: Any = None, **options: Any
    ) -> Tensor:
        """x: (B, h * w, D), as ComfyUI's ``CrossAttention`` takes it. Returns (B, h * w, D)."""
        given = options.get("transformer_options") or {}
        size = tuple(given.get("activations_shape", ()))[-2:]
        if self.sigmas is not None and not _holds(self.sigmas, given.get("sigmas")):
            self._count("other steps")
        elif reason := self._needs_attention(x, (context, value), mask, size):
            self._count("attention", reason)
        else:
            self._count("hyena")
            return self._run(x, size)
        if self.before is not None:
            return self.before(x, context, value, mask, **options)
        kind: Any = type(self.attention)
        return kind.forward(self.attention, x, context, value, mask, **options)

    def _count(self, what: str, reason: str = "") -> None:
        if torch.compiler.is_compiling():  # which would trace anew whenever a count has changed
            return
        if reason and not self.calls[what]:
            logger.warning("layer %s: %s: such calls go to attention, not to Hyena", self.target.name, reason)
        self.calls[what] += 1

    def _needs_attention(self, x: Tensor, others: Iterable[Any], mask: Any, size: tuple[int, ...]) -> str:
        """Why a call is not for the operator, or ""."""
        if mask is not None:
            return "it has a mask"
        if len(size) != 2:
            return "the grid of the tokens is unknown"
        h, w = size
        if x.shape[1] != h * w:
            return f"{x.shape[1]} tokens are not the picture's {h} x {w} cells (merged by ToMe, tiled by HyperTile?)"
        if any(other is not None and other is not x for other in others):
            return "it attends to something else than its own tokens"
        return self.operator.refuses((h, w))

    def _run(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        weight = next(self.operator.parameters())
        if weight.device != x.device:  # a partial load leaves on the CPU what does not fit
            self.operator.to(x.device)
        given = projections_of(self.attention) if self.operator.core else None
        return self.operator(x.to(weight.dtype), (size[0], size[1]), given).to(x.dtype)


def find_targets(unet: nn.Module) -> dict[str, Target]:
    """All replaceable layers of ComfyUI's ``diffusion_model`` by name, in the order they run; paths begin with
    ``diffusion_model.``.

    Raises UsageError if it is not a UNet of the Stable Diffusion family.
    """
    found: dict[str, Target] = {}
    downscale = 1
    for prefix, part, blocks in _blocks(unet):
        for index, block in enumerate(blocks):
            for place, module in enumerate(block):
                downscale = downscale * 2 if type(module).__name__ == "Downsample" else downscale
                name = f"{prefix}{index:02d}"
                path = f"diffusion_model.{part}.{place}" if prefix == "M" else f"diffusion_model.{part}.{index}.{place}"
                found |= {target.name: target for target in _targets_in(module, name, path, downscale)}
                downscale = downscale // 2 if type(module).__name__ == "Upsample" else downscale
    if not found:
        raise UsageError(f"{type(unet).__name__} is no UNet of {SUPPORTED}, and Hyena layers are for those alone")
    return found


def _blocks(unet: nn.Module) -> Iterator[tuple[str, str, Iterable[Any]]]:
    """Layer names' beginnings, attributes, and the blocks there."""
    yield "IN", "input_blocks", getattr(unet, "input_blocks", ())
    middle = getattr(unet, "middle_block", None)
    yield "M", "middle_block", () if middle is None else (middle,)
    yield "OUT", "output_blocks", getattr(unet, "output_blocks", ())


def _targets_in(transformer: nn.Module, name: str, path: str, downscale: int) -> Iterator[Target]:
    if hasattr(transformer, "time_stack"):  # of video
        return
    blocks: Any = getattr(transformer, "transformer_blocks", ())
    for number, block in enumerate(blocks):
        if getattr(block, "disable_self_attn", False):
            continue
        where = f"{path}.transformer_blocks.{number}.attn1"
        to_q = block.attn1.to_q
        yield Target(
            name=name if len(blocks) == 1 else f"{name}.{number}",
            path=where,
            transformer=path,
            ldm_key=f"model.{where}",
            dim=to_q.in_features,
            inner_dim=to_q.out_features,
            heads=block.attn1.heads,
            downscale=downscale,
        )


def attach(
    model: Any,
    file: HyenaFile,
    targets: str | Iterable[str] | None = None,
    scaling: str | None = None,
    start: float = 0.0,
    end: float = 1.0,
    skip: bool = False,
) -> tuple[Any, Attached]:
    """A clone of a ``ModelPatcher`` whose self-attention is a file's operators at ``targets``, and what was done.

    Args:
        model: ComfyUI's; it is left as it is.
        targets: names, ``high`` or ``all``; everything the file holds unless given.
        scaling: ``extend`` or ``stretch``, overriding the file's.
        start, end: shares of the denoising from and to which Hyena is on; before and after, what was there.
        skip: leaves layers as they are that do not fit, where they are errors otherwise.

    Where a layer is patched already, the new operator is in use within its range. Raises UsageError if the model is of
    another family, or a layer does not fit, and without ``skip`` if one is missing.
    """
    import comfy.model_patcher

    if not 0 <= start < end <= 1:
        raise UsageError(f"start and end are shares of the denoising, 0 <= start < end <= 1; got {start:g} and {end:g}")
    try:
        available = find_targets(model.get_model_object("diffusion_model"))
        chosen, left = _fitting(available, file, targets) if skip else (choose_layers(available, file, targets), {})
    except UsageError as error:
        if not skip:
            raise
        chosen, left = {}, {"all layers": str(error)}
    if not chosen:
        return model.clone(), Attached(file.label, left=left)
    attentions = {target.name: model.get_model_object(target.path) for target in available.values()}
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    operators = {}
    for stored, name in chosen.items():
        operators[name] = file.build(stored, scaling).requires_grad_(False)
        try:
            convert(operators[name], None, dtype)
        except UsageError as error:
            raise UsageError(f"{file.label}: layer {name}: {error}") from None

    patched = model.clone()
    sigmas = _sigmas(model, start, end)
    for name, operator in operators.items():
        path = f"{available[name].path}.forward"
        before = patched.object_patches.get(path)
        while sigmas is None and isinstance(before, HyenaForward):  # never in use again
            before = before.before
        forward = HyenaForward(available[name], operator, attentions[name], before, sigmas)
        patched.add_object_patch(path, forward)
    ours = comfy.model_patcher.ModelPatcher(
        nn.ModuleList(operators.values()), load_device=model.load_device, offload_device=model.offload_device
    )
    used = {id(operator) for operator in _operators(patched.object_patches)}
    there = patched.get_additional_models_with_key(KEY)
    kept = [each for each in there if any(id(operator) in used for operator in each.model)]
    patched.set_additional_models(KEY, [*kept, ours])
    layers = {name: _described(file, stored, operators[name]) for stored, name in chosen.items()}
    return patched, Attached(file.label, layers, left, _further(file, chosen, list(attentions.values())))


def _fitting(
    available: Mapping[str, Target], file: HyenaFile, targets: str | Iterable[str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """:func:`choose_layers` of what fits, and by layer why others do not."""
    if "" in file.layers:
        return choose_layers(available, file, targets), {}
    chosen, left = {}, {}
    for word in parse_names(",".join(given_words("all" if targets is None else targets, "targets"))):
        if word == "all":
            names = list(file.layers)
        elif word in GROUPS:
            names = [name for name in names_of(available, [word]) if name in file.layers]
        else:
            names = [name for name in available if name == word or name.startswith(f"{word}.")] or [word]
        for name in names:
            if name not in file.layers:
                left[name] = "the file has no such layer"
                continue
            try:
                check_layer(available, file, name, name)
            except UsageError as error:
                left[name] = str(error).removeprefix(f"{file.label}: ")
            else:
                chosen[name] = name
    return chosen, left


def _operators(patches: Mapping[str, Any]) -> Iterator[Operator]:
    for forward in patches.values():
        while isinstance(forward, HyenaForward):
            yield forward.operator
            forward = forward.before


def _sigmas(model: Any, start: float, end: float) -> tuple[float, float] | None:
    """The noise levels between ``start`` and ``end``, shares of the denoising; None for all of it."""
    if (start, end) == (0, 1):
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(end)), float(sampling.percent_to_sigma(start))


def _holds(sigmas: tuple[float, float], now: Tensor | None) -> bool:
    """Whether a call at these noise levels is in range; one that says nothing of them is."""
    if now is None:
        return True
    return sigmas[0] < torch.max(now).item() <= sigmas[1]


def _described(file: HyenaFile, stored: str, operator: Operator) -> str:
    error = file.layers[stored].figures.get("relative_error")
    measured = "" if error is None else f", held-out error {error:.4f}"
    return f"{operator.config.label}, {operator.config.form}{measured}"


def _further(file: HyenaFile, stored: Iterable[str], attentions: list[nn.Module]) -> float:
    sample = sample_of_attentions(attentions)
    further = max(distance(file.origin(name).teacher.get(SAMPLE), sample) for name in stored)
    if further:
        logger.warning("%s: was taught by another model than this one", file.label)
    return further
