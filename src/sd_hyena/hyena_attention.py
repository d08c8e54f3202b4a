"""``HyenaAttention``: diffusers' self-attention with an operator in place of what it computes.

The module stays where it is, with its projections where LoRA and offloading find them and its processor for hosts to
change. Only its class is swapped: taking the operator out gives back the attention as the host has it by then. Hooks
that kept the module's ``forward`` from before still come by here, since ``Attention.forward`` asks for ``processor``.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import torch
from diffusers.hooks import group_offloading
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .grid import is_grid_mask
from .nn.teacher import PROJECTIONS, projections_of
from .placement import bring, put_aside

# Of a tensor's name in a whole UNet, that of its place in one.
_IN_A_UNET = re.compile(r"(^|\.)(down_blocks|mid_block|up_blocks)\.")
# Perturbed-attention guidance: the batch's last third or half attends to nothing but itself.
_PERTURBED = {"PAGCFGIdentitySelfAttnProcessor2_0": 3, "PAGIdentitySelfAttnProcessor2_0": 2}
# Other ways to compute the same: what replaces it makes no difference to their user.
_SAME = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}
# Their pipelines read attention maps, or count the layers that have some.
_READERS = {"CrossAttnStoreProcessor", "AttendExciteAttnProcessor"}
logger = logging.getLogger(__name__)


class HyenaAttention(Attention):
    """Made of an ``Attention`` by :func:`put_in`, never built. ``operator`` is a submodule of it."""

    @property
    def processor(self) -> Any:
        return _HYENA

    def __setattr__(self, name: str, value: Any) -> None:
        """A host's processor is kept for when the operator is gone; perturbed-attention guidance works now."""
        if name != "processor":
            return super().__setattr__(name, value)
        tell_of_processor(value)
        for kept in (self.__dict__, self._modules):
            kept.pop("processor", None)
        (self._modules if isinstance(value, nn.Module) else self.__dict__)["processor"] = value

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """The host's own."""
        return self._modules["processor"] if "processor" in self._modules else self.__dict__["processor"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A plain UNet's weights are for the attention; the operator keeps its own."""
        if not any(name.startswith(f"{prefix}operator.") for name in state_dict):
            state_dict.update(self.operator.state_dict(prefix=f"{prefix}operator."))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """In a part of a UNet, which hosts copy into models of their own, the original attention's alone."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if not _IN_A_UNET.search(prefix):
            for key in [key for key in state if key.startswith(f"{prefix}operator.")]:
                del state[key]
            say_once("a part of the UNet was copied: the copy has the original attention, not the Hyena layers")
        return state


class _Hyena:
    """The processor of all Hyena layers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: (B, h * w, D) -> (B, h * w, D); attention_mask: of :func:`.grid.grid_mask`. Raises ValueError
        for cross-attention, a mask, or an unknown grid."""
        if encoder_hidden_states is not None or not (attention_mask is None or is_grid_mask(attention_mask)):
            raise ValueError(
                "a Hyena layer replaces plain self-attention: it takes no mask and attends to nothing else"
            )
        if attention_mask is None:
            raise ValueError("the latent grid's size is unknown: attach Hyena layers with sd_hyena.load_hyena")
        size = (attention_mask.shape[1], attention_mask.shape[2])
        host = attn.get_processor()
        if reason := _needs_attention(attn, host, hidden_states, size):
            say_once(f"{reason}: such calls go to the original attention, not to Hyena")
            bring_back(attn)
            return host(attn, hidden_states)
        given = projections_of(attn) if attn.operator.core else None
        kept = _unperturbed(host, len(hidden_states))
        if kept == len(hidden_states):
            return attn.operator(hidden_states, size, given)
        bring_back(attn)
        _, _, to_v, to_out = projections_of(attn)
        perturbed = to_out(to_v(hidden_states[kept:]))
        return torch.cat([attn.operator(hidden_states[:kept], size, given), perturbed]) if kept else perturbed


def _needs_attention(attn: Any, host: Any, hidden_states: Tensor, size: tuple[int, int]) -> str:
    """Why a call is for the original attention, or ""."""
    if hidden_states.shape[1] != size[0] * size[1]:  # tokens were merged or dropped
        return (
            f"{hidden_states.shape[1]} tokens are not the {size[0]} x {size[1]} cells of the picture (tokens merged by "
            "tomesd?)"
        )
    if type(host).__name__ in _READERS:
        return f"{type(host).__name__} reads attention"
    hooks = getattr(attn.to_q, "_diffusers_hook", None)
    if hooks is not None and any("smoothed_energy_guidance" in name for name in hooks.hooks):
        return "smoothed-energy guidance is about queries"
    return ""


def _unperturbed(host: Any, batch: int) -> int:
    """How many samples of a batch are to be attended to; the others, its last ones, only to themselves."""
    for kind in type(host).__mro__:
        if parts := _PERTURBED.get(kind.__name__):
            return batch * (parts - 1) // parts
    # diffusers' guiders perturb a whole call, by skipping the scores within it
    skipped = not torch.compiler.is_compiling() and any(
        type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in _function_modes()
    )
    return 0 if skipped else batch


def _function_modes() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


_HYENA = _Hyena()
# What skips a whole attention layer asks how to, by the class of its processor.
AttentionProcessorRegistry.register(
    _Hyena, AttentionProcessorMetadata(lambda attn, hidden_states, *args, **kwargs: hidden_states)
)


def tell_of_processor(processor: Any) -> None:
    """One line on a processor that is to do what Hyena does not."""
    kinds = {kind.__name__ for kind in type(processor).__mro__[:-1]}
    name = type(processor).__name__
    if name not in _SAME | _READERS and not kinds & _PERTURBED.keys():
        say_once(f"{name} does nothing where Hyena replaces self-attention: it acts on the other layers only")


def put_in(attention: nn.Module, operator: nn.Module, aside: bool) -> None:
    """Makes ``attention`` compute by ``operator``; ``aside``: frees an accelerator of what is not in use then."""
    tell_of_processor(attention.get_processor())
    attention.__class__ = HyenaAttention
    attention.operator = operator
    if aside and not operator.core:
        for child in _others(attention):
            put_aside(child)


def take_out(attention: nn.Module) -> nn.Module:
    """Makes it plain attention again; returns the operator."""
    operator = attention.operator
    bring_back(attention)
    del attention.operator
    attention.__class__ = Attention
    return operator


def bring_back(attention: Any) -> None:
    """Puts everything of a Hyena layer where its operator is, if it was put aside."""
    for child in _others(attention):
        bring(child, attention.operator)


def reapply_group_offloading(unet: nn.Module) -> None:
    """Has diffusers' group offloading, if the UNet is under it, see the modules that are in it by now."""
    group_offloading._maybe_remove_and_reapply_group_offloading(unet)


def has_adapters(attention: nn.Module) -> bool:
    """Whether an adapter of any kind (LoRA, LoKr ...) is active on any of its projections."""
    parts = (getattr(attention, name, None) for name in PROJECTIONS)
    modules = [module for part in parts if part is not None for module in part.modules()]
    return any(getattr(m, "active_adapters", None) and not getattr(m, "disable_adapters", False) for m in modules)


def _others(attention: nn.Module) -> list[nn.Module]:
    return [child for name, child in attention.named_children() if name != "operator"]


@functools.cache
def say_once(text: str) -> None:
    """One line of the log, the first time."""
    logger.warning("%s", text)
