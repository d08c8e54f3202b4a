"""``HyenaAttention``: stands where a transformer block's ``attn1`` stood."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .operator import Operator, Size
from .teacher import PROJECTIONS, projections_of


def grid_mask(hidden_states: Tensor) -> Tensor:
    """An empty attention mask whose shape says what grid (..., h, w) the tokens come from.

    The grid belongs to the call, not to the layer: as an argument it is right for two threads, two sizes, compiled
    blocks and gradient checkpoints, and diffusers hands a mask to self-attention alone.
    """
    return hidden_states.new_empty(0, *hidden_states.shape[-2:])


def is_grid_mask(mask: Tensor | None) -> bool:
    """Whether this is a :func:`grid_mask`."""
    return mask is not None and mask.dim() == 3 and mask.shape[0] == 0


class HyenaAttention(nn.Module):
    """An operator with the interface of a self-attention module.

    Deliberately has no ``get_processor``: hosts that walk a UNet and install attention processors (xformers,
    slicing, IP-Adapter) leave it alone. A ``core`` operator's projections stay reachable as ``to_q`` ... ``to_out``,
    so LoRA weights on them stay live. ``base`` is the replaced module, outside the module tree.
    """

    def __init__(self, operator: Operator, base: nn.Module) -> None:
        super().__init__()
        self.operator = operator
        self._base = (base,)  # in a tuple, so that it is not registered as a submodule
        self.take_projections()

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def take_projections(self) -> None:
        """Uses the projections that the replaced module has by now, if the operator runs on them."""
        for name in PROJECTIONS if self.operator.core else ():
            setattr(self, name, getattr(self.base, name))

    def give_projections(self) -> None:
        """Gives them back: a LoRA library may have wrapped them meanwhile."""
        for name in PROJECTIONS if self.operator.core else ():
            setattr(self.base, name, getattr(self, name))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: (B, h * w, D) -> (B, h * w, D); attention_mask: of :func:`grid_mask`. Raises ValueError
        for cross-attention, a mask, or an unknown grid."""
        if encoder_hidden_states is not None or not (attention_mask is None or is_grid_mask(attention_mask)):
            raise ValueError(
                "a Hyena layer replaces plain self-attention: it takes no mask and attends to nothing else"
            )
        if attention_mask is None:
            raise ValueError("the latent grid's size is unknown: attach Hyena layers with sd_hyena.load_hyena")
        size: Size = (attention_mask.shape[1], attention_mask.shape[2])
        if not self.operator.core:
            return self.operator(hidden_states, size)
        return self.operator(hidden_states, size, projections_of(self))
