"""``HyenaAttention``: stands where a transformer block's ``attn1`` stood."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class HyenaAttention(nn.Module):
    """Replaces a self-attention module by a Hyena operator, and can give it back.

    Deliberately has no ``get_processor``: hosts that walk a UNet and install attention processors
    (xformers, slicing, IP-Adapter) leave it alone. A ``core`` operator's projections stay reachable as
    ``to_q`` ... ``to_out``, so LoRA weights on them stay live. For ``full`` the replaced layer is kept
    outside the module tree, on the CPU if it came from an accelerator.

    ``size``, the (h, w) of the latent grid, is set before each forward pass by the hooks of
    :mod:`sd_hyena.patch`.
    """

    def __init__(self, operator: nn.Module, base: nn.Module) -> None:
        super().__init__()
        self.operator = operator
        self.size: tuple[int, int] | None = None
        self.core = getattr(operator, "form", "full") == "core"
        self._base = (base,)  # in a tuple, so that it is not registered as a submodule
        self._enabled = True
        if self.core:
            for name in PROJECTIONS:
                setattr(self, name, getattr(base, name))
        self._place_base()

    @property
    def enabled(self) -> bool:
        """Whether the operator runs (True) or the replaced attention (False)."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self._place_base()

    def _place_base(self) -> None:
        if self.core:
            return
        if not self._enabled:
            self._bring_base()
        elif next(self.operator.parameters()).device.type != "cpu":
            self._base[0].to("cpu")

    def _bring_base(self) -> nn.Module:
        """The replaced layer, moved to where, and converted to what, the operator is by now."""
        weight = next(self.operator.parameters())
        return self._base[0].to(weight.device, weight.dtype)

    def release(self) -> nn.Module:
        """The replaced attention, on the operator's device and in its type, with the projections it has by now."""
        if not self.core:
            return self._bring_base()
        base = self._base[0]
        for name in PROJECTIONS:  # a LoRA library may have wrapped them meanwhile
            setattr(base, name, getattr(self, name))
        return base

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: (B, h * w, D) -> (B, h * w, D). Raises ValueError for cross-attention or a mask."""
        if not self._enabled:
            return self.release()(
                hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
            )
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "a Hyena layer replaces plain self-attention: it takes no mask and attends to nothing else"
            )
        if self.size is None:
            raise ValueError("the latent grid's size is unknown: attach Hyena layers with sd_hyena.load_hyena")
        if not self.core:
            return self.operator(hidden_states, self.size)
        return self.operator(hidden_states, self.size, projections_of(self))


def projections_of(attention: nn.Module) -> tuple:
    """(to_q, to_k, to_v, to_out) of an attention module, each callable on (B, L, D)."""
    to_out: Any = attention.to_out
    if not isinstance(to_out, nn.ModuleList):
        return attention.to_q, attention.to_k, attention.to_v, to_out
    active = [layer for layer in to_out if not (isinstance(layer, nn.Dropout) and (layer.p == 0 or not layer.training))]
    if len(active) == 1:  # what there is to call in evaluation: the linear layer itself
        return attention.to_q, attention.to_k, attention.to_v, active[0]
    return attention.to_q, attention.to_k, attention.to_v, nn.Sequential(*active)


def is_plain_self_attention(attention: nn.Module) -> bool:
    """True if nothing beyond q, k, v and out happens inside, so that a Hyena operator can stand in."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return (
        all(getattr(attention, name, None) is not None for name in PROJECTIONS)
        and all(getattr(attention, name, None) is None for name in extras)
        and not getattr(attention, "residual_connection", False)
        and not getattr(attention, "is_cross_attention", False)
        and getattr(attention, "rescale_output_factor", 1.0) == 1.0
        and getattr(attention, "inner_kv_dim", None) in (None, getattr(attention, "inner_dim", None))
    )
