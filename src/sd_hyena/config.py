"""What an operator can be told, named once: command-line flags, recipes and saved files are views of these fields.

Light: imports no torch. ``OPERATORS`` is the registry: one line there and one file in :mod:`sd_hyena.nn` add an
operator to training, generation, evaluation, benchmarks and files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from .errors import UsageError
from .settings import option

FORMS = ("full", "core")
FEATURE_MAPS = ("cubed_relu", "squared_relu", "exp", "elu")
SCALINGS = ("stretch", "extend")


class Entry(NamedTuple):
    """Where an operator is (module of ``nn`` and class), which options it takes, and what it is in a few words."""

    where: str
    options: tuple[str, ...]
    summary: str


OPERATORS = {
    "states": Entry("states:States", ("form", "feature_map", "near", "block", "scaling"),
                    "near filter and Hyena over states of blocks"),
    "near": Entry("near:Near", ("form", "feature_map", "near"), "near filter and linear attention"),
    "linear": Entry("linear:LinearAttention", ("form", "feature_map"), "linear attention"),
    "windows": Entry("windows:Windows", ("feature_map", "block"), "softmax in blocks and linear attention, the rival"),
    "long": Entry("long:LongConvolution", ("hyena_filter_order", "hyena_short_filter_order"),
                  "global two-dimensional filter by FFT"),
    "causal": Entry("causal:HyenaOperator", ("hyena_order", "hyena_filter_order", "hyena_num_blocks",
                    "hyena_num_heads", "hyena_short_filter_order"), "causal and one-dimensional, as published"),
}  # fmt: skip
MAX_CELLS = 1 << 22
# Far above any UNet in use; they bound what a file from the internet can make us allocate.
_BOUNDS = {
    "dim": (1, 16384),
    "inner_dim": (0, 16384),
    "height": (1, MAX_CELLS),
    "width": (1, MAX_CELLS),
    "attention_heads": (1, 16384),
    "near": (0, 63),
    "block": (0, 4096),
    "hyena_order": (2, 16),
    "hyena_filter_order": (1, 4096),
    "hyena_num_blocks": (1, 1 << 20),
    "hyena_num_heads": (1, 16384),
    "hyena_short_filter_order": (1, 63),
}


@dataclass(kw_only=True)
class OperatorChoices:
    """What a user chooses."""

    operator: str = option(
        "states", "; ".join(f"{name}: {entry.summary}" for name, entry in OPERATORS.items()), choices=tuple(OPERATORS)
    )
    form: str = option("full", "full: own projections; core: the teacher's", choices=FORMS)
    feature_map: str = option("cubed_relu", "features of linear attention", choices=FEATURE_MAPS)
    near: int = option(3, "edge of the near filter in latent cells, odd; 0: none")
    block: int = option(8, "edge of the blocks in latent cells; 0: the whole grid is one")
    scaling: str = option(
        "stretch",
        "at other sizes; stretch: as many blocks as in training; extend: blocks of the same size",
        choices=SCALINGS,
    )
    hyena_order: int = option(2, "order of the recurrence")
    hyena_filter_order: int = option(64, "width of the filter's MLP")
    hyena_num_blocks: int = option(1, "blocks the sequence is cut into")
    hyena_num_heads: int = option(1, "groups of channels that share filters")
    hyena_short_filter_order: int = option(3, "taps of the short filter")

    def check_choices(self) -> None:
        """Raises UsageError for values of the wrong type, out of bounds, unknown, or that do not fit together."""
        self._check_each(OperatorChoices)  # what else a class of settings has, width in px too, is its own to check
        if self.near and self.near % 2 == 0:
            raise UsageError(f"near must be odd, or 0 for none, got {self.near}")
        if self.form == "core" and "form" not in self.entry.options:
            raise UsageError(f"the {self.operator} operator has its own projections: form must be full")

    def _check_each(self, of: type[OperatorChoices]) -> None:
        for f in fields(of):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            if f.name in _BOUNDS:
                low, high = _BOUNDS[f.name]
                if type(value) is not int or not low <= value <= high:
                    raise UsageError(f"{f.name} must be a whole number from {low} to {high}, got {value!r}")

    @property
    def entry(self) -> Entry:
        return OPERATORS[self.operator]

    def choices(self) -> dict[str, Any]:
        """These choices alone, by name."""
        return {f.name: getattr(self, f.name) for f in fields(OperatorChoices)}

    def unused(self) -> list[str]:
        """Options that this operator does not take and that are not as they are unless given."""
        takes = ("operator", *self.entry.options)
        return [f.name for f in fields(OperatorChoices) if f.name not in takes and getattr(self, f.name) != f.default]


@dataclass
class OperatorConfig(OperatorChoices):
    """Everything needed to build an operator: the choices, and the layer it is for.

    ``height`` and ``width`` are the training grid in latent cells at the layer: the unit in which blocks and filters
    grow; height * width is the longest sequence of ``causal``. ``inner_dim``: width of the projections, 0 for ``dim``.
    Raises UsageError for choices or sizes that cannot be.
    """

    dim: int
    height: int
    width: int
    inner_dim: int = 0
    attention_heads: int = 8

    def __post_init__(self) -> None:
        self.check_choices()
        self._check_each(OperatorConfig)
        if self.height * self.width > MAX_CELLS:
            raise UsageError(f"a grid of {self.height} x {self.width} cells is beyond any image this was made for")

    @property
    def inner(self) -> int:
        """Width of the projections."""
        return self.inner_dim or self.dim

    @property
    def label(self) -> str:
        """The operator in a few words."""
        shown = [str(getattr(self, name)) for name in ("form", "feature_map") if name in self.entry.options]
        shown += [f"{name} {getattr(self, name)}" for name in ("near", "block") if name in self.entry.options]
        return " ".join([self.operator, *shown])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatorConfig:
        """Raises ValueError for missing keys or bad values; keys that are unknown are the caller's to report."""
        missing = [name for name in ("dim", "height", "width", "operator") if name not in values]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})
