"""One description of an operator, shared by the command line, recipes and saved files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from ..ops.linear import FEATURE_MAPS
from .causal import HyenaOperator
from .filter2d import SCALINGS
from .hyena2d import FORMS, GLOBAL_BRANCHES, Hyena2D
from .linear_attention import LinearAttention

OPERATORS = ("hyena2d", "causal", "linear")
# Far above any UNet in use; they bound what a file from the internet can make us allocate.
_LIMITS = {
    "dim": 16384,
    "inner_dim": 16384,
    "order": 16,
    "filter_order": 4096,
    "num_heads": 16384,
    "num_blocks": 1 << 20,
    "attention_heads": 16384,
    "num_features": 64,
    "short_filter_order": 63,
    "height": 1 << 22,
    "width": 1 << 22,
}


@dataclass(frozen=True)
class OperatorConfig:
    """Everything needed to build an operator.

    ``height`` and ``width`` are the training grid in latent cells at the layer: the filter's extent for
    ``hyena2d``; height * width is ``l_max`` for ``causal``; ``linear`` attention has no use for it. The
    constructor raises ValueError for values of the wrong type or out of bounds.
    """

    dim: int
    height: int
    width: int
    operator: str = "hyena2d"
    inner_dim: int = 0  # 0: the same as dim
    order: int = 2
    filter_order: int = 64
    num_blocks: int = 1
    num_heads: int = 1
    attention_heads: int = 8
    short_filter_order: int = 3
    form: str = "full"
    global_branch: str = "linear"
    feature_map: str = "exp"
    num_features: int = 2
    scaling: str = "stretch"
    in_bias: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("operator", OPERATORS),
            ("form", FORMS),
            ("global_branch", GLOBAL_BRANCHES),
            ("scaling", SCALINGS),
            ("feature_map", FEATURE_MAPS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            low = 0 if name == "inner_dim" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= limit:
                raise ValueError(f"{name} must be a whole number from {low} to {limit}, got {value!r}")
        if self.height * self.width > 1 << 22:
            raise ValueError(
                f"a grid of {self.height} x {self.width} cells is beyond any image this operator was made for"
            )
        if not isinstance(self.in_bias, bool):
            raise ValueError(f"in_bias must be true or false, got {self.in_bias!r}")
        if self.operator != "causal" and self.num_blocks != 1:
            raise ValueError(f"num_blocks cuts a sequence and belongs to the causal operator; {self.operator} takes 1")
        if self.operator != "hyena2d" and self.form != "full":
            raise ValueError(f"the {self.operator} operator has its own projections: form must be full")

    def build(self) -> nn.Module:
        """A randomly initialised operator, called as ``op(x, size=(h, w))``; it keeps this as ``config``."""
        operator = self._build()
        operator.config = self
        return operator

    def _build(self) -> nn.Module:
        if self.operator == "causal":
            return HyenaOperator(
                self.dim,
                self.height * self.width,
                order=self.order,
                filter_order=self.filter_order,
                num_heads=self.num_heads,
                num_blocks=self.num_blocks,
                short_filter_order=self.short_filter_order,
            )
        if self.operator == "linear":
            return LinearAttention(
                self.dim,
                inner_dim=self.inner_dim or None,
                attention_heads=self.attention_heads,
                feature_map=self.feature_map,
                num_features=self.num_features,
                in_bias=self.in_bias,
            )
        return Hyena2D(
            self.dim,
            extent=(self.height, self.width),
            inner_dim=self.inner_dim or None,
            order=self.order,
            filter_order=self.filter_order,
            num_heads=self.num_heads,
            attention_heads=self.attention_heads,
            short_filter_order=self.short_filter_order,
            form=self.form,
            global_branch=self.global_branch,
            feature_map=self.feature_map,
            num_features=self.num_features,
            scaling=self.scaling,
            in_bias=self.in_bias,
        )

    @property
    def label(self) -> str:
        """The operator in a few words."""
        attention = f"{self.feature_map} x{self.num_features}" if self.feature_map == "exp" else self.feature_map
        if self.operator == "causal":
            return "causal"
        if self.operator == "linear":
            return f"linear {attention}"
        branch = f"linear {attention}" if self.global_branch == "linear" else self.global_branch
        return f"hyena2d {self.form} {branch} {self.scaling}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatorConfig:
        """Raises ValueError for missing keys or bad values; keys of newer versions are the caller's to report."""
        known = {f.name for f in fields(cls)}
        values = {"feature_map": "elu"} | values  # what files say that were written before there was a choice
        try:
            return cls(**{k: v for k, v in values.items() if k in known})
        except TypeError as error:
            raise ValueError(str(error).replace("OperatorConfig.__init__() ", "")) from None
