"""Attaching Hyena layers to a UNet and taking them off again.

Attaching is all-or-nothing and reversible: everything is checked before the first module is replaced, and
detaching restores the original modules. The true (h, w) of the latent grid comes from a forward pre-hook
on each ``Transformer2DModel`` concerned, so odd sizes need no guessing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .errors import UsageError
from .nn import HyenaAttention, Operator, OperatorConfig
from .nn.attention import grid_mask, is_grid_mask
from .nn.teacher import is_plain_self_attention
from .placement import follow, put_aside
from .targets import Target, find_targets

_LAYERS, _HOOKS = "_sd_hyena_layers", "_sd_hyena_hooks"  # a UNet's own record: by target name; hooks in any order
logger = logging.getLogger(__name__)


def get_unet(pipe_or_unet: Any) -> nn.Module:
    """The UNet of a pipeline, or the UNet itself, or what ``torch.compile`` wrapped. Raises UsageError for others."""
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module):
        raise UsageError(f"expected a diffusers pipeline with a UNet, or a UNet; got {type(pipe_or_unet).__name__}")
    return unet


def attached(unet: nn.Module) -> dict[str, HyenaAttention]:
    """The Hyena layers of a UNet by target name, in running order, switched on or off."""
    layers = getattr(unet, _LAYERS, {})
    return {name: layers[name] for name in find_targets(unet) if name in layers}


def enabled(unet: nn.Module) -> set[str]:
    """Names of the attached layers that are switched on."""
    targets = find_targets(unet)
    return {name for name, layer in attached(unet).items() if unet.get_submodule(targets[name].path) is layer}


def attach(unet: nn.Module, operators: Mapping[str, Operator], convert: bool = True, off: Collection[str] = ()) -> None:
    """Replaces ``attn1`` of each named target by its operator; a target that has one already gets the new one.

    Operators are moved to the device and dtype of the layer they replace and put in evaluation mode, unless
    ``convert`` is off: training keeps its own device and precision. Those named in ``off`` start switched off.
    Raises UsageError, with the UNet untouched, if a target does not exist, does not fit its operator, does
    more than plain self-attention, or has no weights.
    """
    targets = find_targets(unet)
    for name, operator in operators.items():
        check_fit(targets, name, operator.config)
        check_replaceable(unet, targets[name])
    for name, operator in operators.items() if convert else ():  # may run out of memory: before anything is replaced
        follow(operator.eval(), unet.get_submodule(targets[name].path))
    layers = unet.__dict__.setdefault(_LAYERS, {})
    for name, operator in operators.items():
        if name in layers:
            _take_out(unet, targets[name], layers.pop(name))
        layers[name] = HyenaAttention(operator, unet.get_submodule(targets[name].path))
        if name not in off:
            _put_in(unet, targets[name], layers[name], move=False)
    _refresh_hooks(unet)


def check_fit(targets: Mapping[str, Target], name: str, config: OperatorConfig) -> None:
    """Raises UsageError unless the operator that ``config`` describes can stand at target ``name``."""
    if name not in targets:
        raise UsageError(f"this UNet has no self-attention layer {name}; it has {', '.join(targets)}")
    target = targets[name]
    if config.dim != target.dim:
        raise UsageError(
            f"layer {name} has {target.dim} channels, but the operator has {config.dim}: it belongs to another "
            "architecture"
        )
    if config.form == "core" and config.inner != target.inner_dim:
        raise UsageError(
            f"layer {name} projects to {target.inner_dim} channels, but the core operator works on {config.inner}"
        )


def check_replaceable(unet: nn.Module, target: Target) -> None:
    """Raises UsageError if the layer at ``target`` does more than plain self-attention."""
    layer = unet.get_submodule(target.path)
    base = layer.base if isinstance(layer, HyenaAttention) else layer
    if not is_plain_self_attention(base):
        raise UsageError(
            f"layer {target.name} ({type(base).__name__}) does more than plain self-attention and cannot be replaced"
        )


def check_grid(unet: nn.Module, latent: tuple[int, int]) -> None:
    """Raises UsageError if an attached operator cannot take the tokens of an (h, w) latent image."""
    targets = find_targets(unet)
    for name, layer in attached(unet).items():
        size = targets[name].grid(latent)
        if reason := layer.operator.refuses(size):
            raise UsageError(f"layer {name} sees {size[0]} x {size[1]} cells at this size, and {reason}")


def detach(unet: nn.Module, names: list[str] | None = None) -> None:
    """Gives back the original attention at ``names``, or everywhere. Does nothing where none is attached."""
    targets = find_targets(unet)
    for name, layer in attached(unet).items():
        if names is None or name in names:
            _take_out(unet, targets[name], layer)
            getattr(unet, _LAYERS).pop(name)
    _refresh_hooks(unet)


def set_enabled(unet: nn.Module, enabled: bool, names: Collection[str] | None = None) -> None:
    """Switches attached layers, all or those at ``names``, between the operator and the attention it replaced.

    What is switched off is out of the module tree, so that hosts treat what is in use like everything else.
    """
    targets = find_targets(unet)
    for name, layer in attached(unet).items():
        if names is None or name in names:
            (_put_in if enabled else _take_out)(unet, targets[name], layer)
    _refresh_hooks(unet)


def _put_in(unet: nn.Module, target: Target, layer: HyenaAttention, move: bool = True) -> None:
    """Puts a layer where the attention that it replaces is now."""
    if unet.get_submodule(target.path) is layer:
        return
    layer.take_projections()
    if move:
        follow(layer.operator, layer.base)
    if not layer.operator.core:
        put_aside(layer.base)
    _set_submodule(unet, target.path, layer)


def _take_out(unet: nn.Module, target: Target, layer: HyenaAttention) -> None:
    """Puts the attention that a layer replaces back to where it was."""
    if unet.get_submodule(target.path) is not layer:
        return
    layer.give_projections()
    if not layer.operator.core:
        follow(layer.base, layer.operator)
    _set_submodule(unet, target.path, layer.base)


def _refresh_hooks(unet: nn.Module) -> None:
    """Hooks for the layers that are in the tree now, and none where there are none."""
    for handle in unet.__dict__.pop(_HOOKS, ()):
        handle.remove()
    layers = getattr(unet, _LAYERS, {})
    if not layers:
        unet.__dict__.pop(_LAYERS, None)
        unet.__dict__.pop("save_pretrained", None)
        return
    targets, handles = find_targets(unet), []
    here = {name for name in layers if unet.get_submodule(targets[name].path) is layers[name]}
    for path in {targets[name].transformer for name in here}:
        transformer = unet.get_submodule(path)
        handles.append(transformer.register_forward_pre_hook(_send_grid, with_kwargs=True))
        for block in transformer.transformer_blocks:  # all of them get what is sent; attention has no use for it
            if not isinstance(block.attn1, HyenaAttention):
                handles.append(block.attn1.register_forward_pre_hook(_drop_grid, with_kwargs=True))
    setattr(unet, _HOOKS, handles)
    if hasattr(unet, "save_pretrained"):
        unet.save_pretrained = functools.partial(save_without_hyena, unet)


def _send_grid(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if len(args) <= 6 and kwargs.get("attention_mask") is None:
        kwargs = kwargs | {"attention_mask": grid_mask(hidden_states)}
    return args, kwargs


def _drop_grid(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if is_grid_mask(kwargs.get("attention_mask")):
        kwargs = kwargs | {"attention_mask": None}
    return args, kwargs


def _set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def save_without_hyena(
    unet: Any,
    save_directory: Any,
    is_main_process: bool = True,
    save_function: Any = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    **kwargs: Any,
) -> Any:
    """``save_pretrained`` of a patched UNet: saves the original attention. Its parameters are those that pipelines
    look for."""
    logger.warning("Hyena layers are not part of what save_pretrained writes: keep them with sd_hyena.save_hyena")
    given = {
        "is_main_process": is_main_process,
        "save_function": save_function,
        "safe_serialization": safe_serialization,
        "variant": variant,
        "max_shard_size": max_shard_size,
        "push_to_hub": push_to_hub,
    }
    targets = find_targets(unet)
    here = [name for name, layer in attached(unet).items() if unet.get_submodule(targets[name].path) is layer]
    try:
        for name in here:
            _take_out(unet, targets[name], attached(unet)[name])
        return type(unet).save_pretrained(unet, save_directory, **given, **kwargs)
    finally:
        for name in here:
            _put_in(unet, targets[name], attached(unet)[name])
