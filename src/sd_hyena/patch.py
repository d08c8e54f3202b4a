"""Attaching Hyena layers to a UNet and taking them off again.

Attaching is all-or-nothing and reversible: everything is checked before the first module is replaced, and
detaching restores the original modules. The true (h, w) of the latent grid comes from a forward pre-hook
on each ``Transformer2DModel`` concerned, so odd sizes need no guessing.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import UsageError
from .nn import HyenaAttention, OperatorConfig
from .nn.attention import is_plain_self_attention
from .targets import Target, find_targets

_HOOKS = "_sd_hyena_hooks"
logger = logging.getLogger(__name__)


def get_unet(pipe_or_unet: Any) -> nn.Module:
    """The UNet of a pipeline, or the UNet itself. Raises UsageError for anything else."""
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    if not isinstance(unet, nn.Module):
        raise UsageError(f"expected a diffusers pipeline with a UNet, or a UNet; got {type(pipe_or_unet).__name__}")
    return unet


def attached(unet: nn.Module) -> dict[str, HyenaAttention]:
    """The Hyena layers in a UNet, by target name."""
    layers = {name: unet.get_submodule(t.path) for name, t in find_targets(unet).items()}
    return {name: layer for name, layer in layers.items() if isinstance(layer, HyenaAttention)}


def attach(unet: nn.Module, operators: Mapping[str, nn.Module], convert: bool = True) -> None:
    """Replaces ``attn1`` of each named target by its operator; a target that has one already gets the new one.

    Operators are moved to the device and dtype of the layer they replace and put in evaluation mode, unless
    ``convert`` is off: training keeps its own precision.
    Raises UsageError, with the UNet untouched, if a target does not exist, does not fit its operator, or
    does more than plain self-attention.
    """
    targets = find_targets(unet)
    for name, operator in operators.items():
        check_fit(targets, name, operator)
        check_replaceable(unet, targets[name])
    for name, operator in operators.items() if convert else ():  # may run out of memory: before anything is replaced
        weight = next(_base(unet.get_submodule(targets[name].path)).parameters())
        operator.to(weight.device, weight.dtype).eval()
    if not hasattr(unet, _HOOKS):
        setattr(unet, _HOOKS, {})
    for name, operator in operators.items():
        target = targets[name]
        current = unet.get_submodule(target.path)
        base = current.release() if isinstance(current, HyenaAttention) else current
        layer = HyenaAttention(operator, base)
        _set_submodule(unet, target.path, layer)
        hooks = getattr(unet, _HOOKS)
        if target.transformer not in hooks:
            transformer = unet.get_submodule(target.transformer)
            hooks[target.transformer] = transformer.register_forward_pre_hook(_record_size, with_kwargs=True)
    _guard_save(unet)


def check_fit(targets: Mapping[str, Target], name: str, operator: nn.Module | OperatorConfig) -> None:
    """Raises UsageError unless ``operator``, or the one it describes, can stand at target ``name``."""
    if name not in targets:
        raise UsageError(f"this UNet has no self-attention layer {name}; it has {', '.join(targets)}")
    expected, found = targets[name].dim, operator.dim
    if expected != found:
        raise UsageError(
            f"layer {name} has {expected} channels, but the operator has {found}: it belongs to another architecture"
        )
    inner = getattr(operator, "inner_dim", 0) or found
    if getattr(operator, "form", "full") == "core" and inner != targets[name].inner_dim:
        raise UsageError(
            f"layer {name} projects to {targets[name].inner_dim} channels, but the core operator works on {inner}"
        )


def check_replaceable(unet: nn.Module, target: Target) -> None:
    """Raises UsageError if the layer at ``target`` does more than plain self-attention."""
    base = _base(unet.get_submodule(target.path))
    if not is_plain_self_attention(base):
        raise UsageError(
            f"layer {target.name} ({type(base).__name__}) does more than plain self-attention and cannot be replaced"
        )


def check_grid(unet: nn.Module, latent: tuple[int, int]) -> None:
    """Raises UsageError if an attached causal operator cannot take the tokens of an (h, w) latent image."""
    targets = find_targets(unet)
    for name, layer in attached(unet).items():
        h, w = targets[name].grid(latent)
        l_max = getattr(layer.operator, "l_max", h * w)
        if h * w > l_max:
            raise UsageError(
                f"layer {name} sees {h} x {w} = {h * w} tokens at this size, but its causal operator was built for "
                f"{l_max}: draw smaller, or train one at this size"
            )


def detach(unet: nn.Module, names: list[str] | None = None) -> None:
    """Gives back the original attention at ``names``, or everywhere. Does nothing where none is attached."""
    targets = find_targets(unet)
    for name, layer in attached(unet).items():
        if names is None or name in names:
            _set_submodule(unet, targets[name].path, layer.release())
    remaining = {targets[name].transformer for name in attached(unet)}
    hooks = getattr(unet, _HOOKS, {})
    for path in set(hooks) - remaining:
        hooks.pop(path).remove()
    if not remaining and hasattr(unet, _HOOKS):
        delattr(unet, _HOOKS)
        unet.__dict__.pop("save_pretrained", None)


def set_enabled(unet: nn.Module, enabled: bool) -> None:
    """Switches every attached layer between the operator and the attention it replaced."""
    for layer in attached(unet).values():
        layer.enabled = enabled


def _base(layer: nn.Module) -> nn.Module:
    return layer._base[0] if isinstance(layer, HyenaAttention) else layer


def _record_size(transformer: nn.Module, args: tuple, kwargs: dict) -> None:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    for block in transformer.transformer_blocks:
        if isinstance(block.attn1, HyenaAttention):
            block.attn1.size = (hidden_states.shape[-2], hidden_states.shape[-1])


def _set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _guard_save(unet: nn.Module) -> None:
    if not hasattr(unet, "save_pretrained"):
        return

    @functools.wraps(type(unet).save_pretrained)  # pipelines read its signature to know what they may pass
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _save_without_hyena(self, *args, **kwargs)

    unet.save_pretrained = types.MethodType(save_pretrained, unet)


def _save_without_hyena(unet: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a patched UNet: saves the original attention.

    Saved as it stands, diffusers would reload it as attention with random weights and only a warning.
    """
    logger.warning("the Hyena layers are not part of what save_pretrained writes: keep them with sd_hyena.save_hyena")
    targets, layers = find_targets(unet), attached(unet)
    try:
        for name, layer in layers.items():
            _set_submodule(unet, targets[name].path, layer.release())
        return type(unet).save_pretrained(unet, *args, **kwargs)
    finally:
        for name, layer in layers.items():
            _set_submodule(unet, targets[name].path, layer)
