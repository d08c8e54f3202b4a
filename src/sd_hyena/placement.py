"""Where modules are, and how a host treats them there: devices, types, weights that are offloaded or cast.

An operator comes into a UNet that is somewhere already: it is put there too, with the same treatment, and never loses
weights or precision on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .finite import beyond, fits


def follow(module: nn.Module, neighbour: nn.Module, around: nn.Module) -> None:
    """Puts ``module`` where ``neighbour`` is, and into the type that it computes in; frozen if that is.

    ``around``, which both are in, tells where the neighbour's weights do not, being quantised. Under Accelerate's
    sequential offload the module's weights are offloaded too. Raises UsageError if the neighbour has no weights (is on
    the meta device), or the module has weights that its type cannot hold.
    """
    first = next(neighbour.parameters(), None)
    module.requires_grad_(first is not None and first.requires_grad)
    dtype = compute_dtype(neighbour) or compute_dtype(around)
    offload = _offload_hook(neighbour)
    if offload is not None:
        if _offload_hook(module) is None:
            from accelerate import cpu_offload

            convert(module, None, dtype)
            cpu_offload(module, execution_device=offload.execution_device)
        return
    if _offload_hook(module) is not None:  # the host has ended its offload since
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(module)
    device = device_of(neighbour if first is not None else around)
    if device.type == "meta":
        raise UsageError("the UNet has no weights yet (it is on the meta device): load them before Hyena layers")
    convert(module, device, dtype)


def convert(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Moves a module and changes its type, where they are given. Raises UsageError for weights that the type cannot
    hold; a host's own type for the weights it casts stays."""
    if any(_casting_hook(part) is not None for part in module.modules()):
        dtype = None  # its host has a type for its weights
    for name, weight in module.named_parameters() if dtype is not None else ():
        if not fits(weight, dtype):
            raise UsageError(f"the operator's {name} {beyond(dtype)}")
    module.to(device=device, dtype=dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter is."""
    return next(module.parameters()).device


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The type a module computes in, whatever its weights are stored in between calls; None if it cannot be told."""
    for part in module.modules():
        if (hook := _casting_hook(part)) is not None:
            return hook.compute_dtype
    types = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(types, None)


def put_aside(module: nn.Module) -> None:
    """Frees an accelerator of a module that is not in use; what is offloaded is aside already."""
    if not _is_offloaded(module) and _devices(module) - {"cpu", "meta"}:
        module.to("cpu")


def bring(module: nn.Module, neighbour: nn.Module) -> None:
    """Puts back what :func:`put_aside` has put aside, to where ``neighbour`` is."""
    if _devices(module) == {"cpu"} and not _is_offloaded(module):
        device = device_of(neighbour)
        if device.type not in ("cpu", "meta"):
            module.to(device)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state dict on the CPU, offloaded weights included, eight-bit ones as float32. Raises UsageError if a LoRA
    library has wrapped parts of it."""
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise UsageError("the operator has been wrapped by a LoRA library: take the adapter out before saving it")
    state = module.state_dict()
    if _offload_hook(module) is not None:
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(module)
    small = {name for name, t in state.items() if t.is_floating_point() and t.dtype.itemsize == 1}
    return {
        name: (t.detach().float() if name in small else t.detach()).contiguous().cpu().clone()
        for name, t in state.items()
    }


def _devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.parameters()}


def _offload_hook(module: nn.Module) -> Any:
    """The hook by which Accelerate keeps a module's weights elsewhere, or None."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if getattr(each, "offload", False):
                return each
    return None


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a host moves its weights about: Accelerate, or diffusers in groups."""
    groups = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return _offload_hook(module) is not None or any(g and g.get_hook("group_offloading") for g in groups)


def _casting_hook(module: nn.Module) -> Any:
    """The hook by which diffusers keeps a module's weights in a smaller type, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook("layerwise_casting") if registry is not None else None
