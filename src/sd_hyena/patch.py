"""Attaching Hyena layers to a UNet and taking them off again.

Attaching is all-or-nothing and reversible: everything is checked before the first layer is changed, and
detaching restores the original attention. The true (h, w) of the latent grid comes from a forward pre-hook
on each ``Transformer2DModel`` concerned, so odd sizes need no guessing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UsageError
from .grid import drop, send
from .hyena_attention import Attention, HyenaAttention, has_adapters, put_in, reapply_group_offloading, take_out
from .nn import Operator
from .nn.teacher import is_plain_self_attention
from .placement import follow
from .targets import SUPPORTED, Target, check_fit, find_targets

_LAYERS, _HOOKS = "_sd_hyena_layers", "_sd_hyena_hooks"  # a UNet's own record: by target name; hooks
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A Hyena layer of a UNet: the operator, the attention that it replaces or, switched off, stands beside, and the
    transformer that both are in. Modules, not paths: hosts wrap some in others."""

    target: Target
    operator: Operator
    attention: nn.Module
    transformer: nn.Module

    @property
    def enabled(self) -> bool:
        """Whether the operator is in use."""
        return getattr(self.attention, "operator", None) is self.operator

    @property
    def block(self) -> nn.Module:
        """The block of the transformer whose self-attention this is."""
        return next(block for block in self.transformer.transformer_blocks if block.attn1 is self.attention)


def get_unet(pipe_or_unet: Any) -> nn.Module:
    """The UNet of a pipeline, or the UNet itself, or what ``torch.compile``, peft or data parallelism have wrapped.
    Raises UsageError for others."""
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    while True:
        if hasattr(unet, "get_base_model"):  # peft's
            unet = unet.get_base_model()
        elif isinstance(unet, nn.DataParallel | nn.parallel.DistributedDataParallel):
            unet = unet.module
        elif hasattr(unet, "_orig_mod"):
            unet = unet._orig_mod
        else:
            break
    if not isinstance(unet, nn.Module):
        raise UsageError(f"{type(pipe_or_unet).__name__} has no UNet: Hyena layers are for those of {SUPPORTED}")
    return unet


def attached(unet: nn.Module) -> dict[str, Layer]:
    """The Hyena layers of a UNet by target name, in running order, switched on or off."""
    return dict(unet.__dict__.get(_LAYERS, {}))


def attach(unet: nn.Module, operators: Mapping[str, Operator], convert: bool = True, off: Collection[str] = ()) -> None:
    """Has each named target compute by its operator; a target that has one already gets the new one.

    Operators are moved to the device and dtype of the layer they replace and put in evaluation mode, unless
    ``convert`` is off: training keeps its own device and precision, and the layers stay where they are. Those named
    in ``off`` start switched off.
    Raises UsageError, with the UNet untouched, if a target does not exist, does not fit its operator, does
    more than plain self-attention, has no weights, or is of a type that cannot hold the operator's.
    """
    targets = find_targets(unet)
    for name, operator in operators.items():
        check_fit(targets, name, operator.config)
        check_replaceable(unet, targets[name])
    here = attached(unet)
    layers = {}
    for name, operator in operators.items():
        target = targets[name]
        layers[name] = Layer(target, operator, unet.get_submodule(target.path), unet.get_submodule(target.transformer))
    for name, layer in layers.items() if convert else ():  # may run out of memory: before anything is replaced
        there = here[name].operator if name in here and here[name].enabled else layer.attention
        layer.operator.eval()
        _follow(layer, there)
    for name, layer in layers.items():
        if name in here:
            _switch(here[name], False)
        if name not in off:
            _switch(layer, True, convert)
    record = here | layers
    unet.__dict__[_LAYERS] = {name: record[name] for name in targets if name in record}
    _refresh(unet)
    _tell_of_lora(unet, operators)


def check_replaceable(unet: nn.Module, target: Target) -> None:
    """Raises UsageError if the layer at ``target`` does more than plain self-attention."""
    attention = unet.get_submodule(target.path)
    if type(attention) not in (Attention, HyenaAttention) or not is_plain_self_attention(attention):
        raise UsageError(
            f"layer {target.name} ({type(attention).__name__}) does more than plain self-attention and cannot be "
            "replaced"
        )


def check_grid(unet: nn.Module, latent: tuple[int, int]) -> None:
    """Raises UsageError if an attached operator cannot take the tokens of an (h, w) latent image."""
    for name, layer in attached(unet).items():
        size = layer.target.grid(latent)
        if reason := layer.operator.refuses(size):
            raise UsageError(f"layer {name} sees {size[0]} x {size[1]} cells at this size, and {reason}")


def detach(unet: nn.Module, names: Collection[str] | None = None) -> None:
    """Gives back the original attention at ``names``, or everywhere. Does nothing where none is attached."""
    for name, layer in attached(unet).items():
        if names is None or name in names:
            _switch(layer, False)
            unet.__dict__[_LAYERS].pop(name)
    _refresh(unet)


def set_enabled(unet: nn.Module, enabled: bool, names: Collection[str] | None = None) -> None:
    """Switches attached layers, all or those at ``names``, between the operator and the attention it replaced.

    What is switched off is out of the module tree, so that hosts treat what is in use like everything else.
    """
    for name, layer in attached(unet).items():
        if names is None or name in names:
            if enabled and not layer.enabled:
                _follow(layer, layer.attention)
            _switch(layer, enabled)
    _refresh(unet)
    if enabled:
        _tell_of_lora(unet, names)


def _follow(layer: Layer, neighbour: nn.Module) -> None:
    try:
        follow(layer.operator, neighbour, layer.block)
    except UsageError as error:
        origin = layer.operator.origin
        where = f"{origin.path}: " if origin and origin.path else ""
        raise UsageError(f"{where}layer {layer.target.name}: {error}") from None


def _switch(layer: Layer, on: bool, aside: bool = True) -> None:
    if on and not layer.enabled:
        put_in(layer.attention, layer.operator, aside)
    elif not on and layer.enabled:
        take_out(layer.attention)


def _refresh(unet: nn.Module) -> None:
    """Hooks for the layers that are in use now, and none where there are none."""
    for handle in unet.__dict__.pop(_HOOKS, ()):
        handle.remove()
    for name in _HOST_METHODS:
        unet.__dict__.pop(name, None)
    reapply_group_offloading(unet)
    layers = attached(unet)
    if not layers:
        unet.__dict__.pop(_LAYERS, None)
        return
    handles = []
    for transformer in {id(each.transformer): each.transformer for each in layers.values() if each.enabled}.values():
        handles.append(transformer.register_forward_pre_hook(send, with_kwargs=True))
        for block in transformer.transformer_blocks:  # all of them get what is sent; attention has no use for it
            if not isinstance(block.attn1, HyenaAttention):
                handles.append(block.attn1.register_forward_pre_hook(drop, with_kwargs=True))
    setattr(unet, _HOOKS, handles)
    for name, ours in _HOST_METHODS.items():
        if host := getattr(type(unet), name, None):  # wrapped, for pipelines look at the parameters that it takes
            setattr(unet, name, functools.update_wrapper(functools.partial(ours, unet, host), host))


def _with_lora(unet: Any, host: Any, *args: Any, **kwargs: Any) -> Any:
    """A UNet's own way of taking a LoRA, which is not for operators, and then a line on what of it does nothing."""
    with _without_hyena(unet):
        result = host(unet, *args, **kwargs)
    _tell_of_lora(unet)
    return result


def _tell_of_lora(unet: nn.Module, names: Collection[str] | None = None) -> None:
    idle = [
        name
        for name, layer in attached(unet).items()
        if layer.enabled and not layer.operator.core and has_adapters(layer.attention)
    ]
    if idle and (names is None or set(idle) & set(names)):
        logger.warning(
            "the LoRA's part in the self-attention of %s does nothing while full Hyena layers replace it; its other "
            "parts work. For all of it use Hyena layers in core form, or layers taught with the LoRA fused",
            ", ".join(idle),
        )


def _save(unet: Any, host: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a patched UNet: saves the original attention."""
    logger.warning(
        "Hyena layers are not part of what save_pretrained writes: keep them with sd_hyena.save_hyena or "
        "sd_hyena.save_pretrained"
    )
    with _without_hyena(unet):
        return host(unet, *args, **kwargs)


@contextlib.contextmanager
def _without_hyena(unet: nn.Module) -> Iterator[None]:
    """Within the block the UNet is as if there were no Hyena layers, but for hooks that then do nothing."""
    here = [layer for layer in attached(unet).values() if layer.enabled]
    try:
        for layer in here:
            _switch(layer, False)
        yield
    finally:
        for layer in here:
            _switch(layer, True)


# What a patched UNet does its own way.
_HOST_METHODS = {"save_pretrained": _save, "load_lora_adapter": _with_lora, "add_adapter": _with_lora}
