"""What can stand in ``attn1``'s place."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import OperatorConfig
from .teacher import Projections, projections_of

Size = tuple[int, int]
Projection = Callable[[Tensor], Tensor]


class Linear(nn.Linear):
    """``nn.Linear`` by the fastest route the device has.

    On a CPU, float32 goes through oneDNN as a 1x1 convolution over tokens: PyTorch's own route is MKL, which leaves
    AVX-512 of other makers' processors unused (2 to 3 times slower there).
    """

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


class InProjection(Linear):
    """q, k and v, (B, L, E / 3) each, by one weight: apart in memory, and so are their gradients."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if type(self.weight) is not nn.Parameter:  # quantised, for instance
            return F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
        return tuple(project(x, w, b) for w, b in zip(self.weight.chunk(3), biases, strict=True))


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as :class:`Linear` does it. x: (..., D); weight: (E, D). Returns (..., E)."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    there = (
        type(weight) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
    return there and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


class Operator(nn.Module, ABC):
    """The base of all operators.

    A subclass has ``in_proj`` and ``out_proj`` (but in ``core`` form, which runs on the teacher's projections, given
    in the call), and calls its submodules, never reading their weights: what a host does to a module (offloading,
    casting, wrapping) happens when that module is called.

    Attributes:
        config: what built it. It would build it again.
        branches: names of the parts that :attr:`off` can name, one at a time, to leave that part out.
        rates: for names of parameters, what their learning rate is multiplied by.
        origin: where its weights came from, if they were read from a file.
    """

    branches: tuple[str, ...] = ()
    rates: dict[str, float] = {}  # noqa: RUF012 - replaced, never changed

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.inner_dim = config.dim, config.inner
        self.core = config.form == "core"
        self.off = ""
        self.origin: Any = None

    def forward(self, x: Tensor, size: Size, projections: Iterable[Projection] | None = None) -> Tensor:
        """x: (B, h * w, D), row-major over the grid; size: (h, w). Returns (B, h * w, D).

        ``core`` needs ``projections`` = (to_q, to_k, to_v, to_out); ``full`` takes none. Raises ValueError if that
        or the token count does not fit.
        """
        if x.shape[1] != size[0] * size[1]:
            raise ValueError(f"{x.shape[1]} tokens are not a {size[0]} x {size[1]} grid")
        if self.core and projections is None:
            raise ValueError("a core operator runs on the teacher's projections: attach it to its UNet")
        if not self.core and projections is not None:
            raise ValueError("a full operator has its own projections")
        if reason := self.refuses(size):
            raise ValueError(f"a {self.config.operator} operator cannot run on {size[0]} x {size[1]} cells: {reason}")
        return self.run(x, size, projections)

    @abstractmethod
    def run(self, x: Tensor, size: Size, projections: Iterable[Projection] | None) -> Tensor:
        """:meth:`forward` for arguments that fit."""

    @abstractmethod
    def reference(self, x: Tensor, size: Size, tokens: Tensor, projections: Iterable[Projection] | None) -> Tensor:
        """The definition at ``tokens``, (B, S, D), without anything fast; the module is in x's type."""

    def expected(
        self, x: Tensor, size: Size, tokens: Tensor | None = None, projections: Iterable[Projection] | None = None
    ) -> Tensor:
        """:meth:`reference` in float64, differentiable, at ``tokens``, all unless given: (B, S, D)."""
        tokens = torch.arange(x.shape[1], device=x.device) if tokens is None else tokens
        twin: Operator = copy.deepcopy(self).double()
        return twin.reference(
            x.double(), size, tokens, None if projections is None else Projections(*projections).double()
        )

    @abstractmethod
    def start_from(self, attention: nn.Module, records: Sequence[tuple[Tensor, Size]]) -> None:
        """Makes step 0 sensible: weights from a teacher's attention layer. ``records``: inputs x, (B, h w, D), that
        it saw, and their grids; there may be none."""

    def unfold(self) -> None:
        """For training: takes apart what learns better in parts, and computes the same."""

    def folded(self) -> Operator:
        """What is kept after training: the same function without those parts; itself if it has none."""
        return self

    def refuses(self, size: Size) -> str:
        """Why it cannot run on an (h, w) grid, or ""."""
        return ""

    def flops(self, size: Size) -> int:
        """Floating point operations for one image on an (h, w) grid beyond the projections."""
        return 0

    def parameter_groups(self, rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW: projections decay, nothing else does, and :attr:`rates` apply."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            factor = next((r for prefix, r in self.rates.items() if name.startswith(prefix)), 1.0)
            decay = weight_decay if name in ("in_proj.weight", "out_proj.weight") else 0.0
            groups.setdefault((factor * rate, decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def copy_projections(operator: Any, attention: nn.Module, scale: float = 1.0, offset: float = 0.0) -> None:
    """Makes an operator's projections the teacher's, what is made of q and k being ``scale`` times that plus
    ``offset``."""
    *inputs, to_out = projections_of(attention)
    for part, (layer, how) in enumerate(zip(inputs, ((scale, offset), (scale, offset), (1.0, 0.0)), strict=True)):
        rows = slice(part * operator.inner_dim, (part + 1) * operator.inner_dim)
        copy_linear(operator.in_proj, rows, layer, *how)
    copy_linear(operator.out_proj, slice(None), to_out)


@torch.no_grad()
def copy_linear(target: nn.Linear, rows: slice, source: Any, scale: float = 1.0, offset: float = 0.0) -> None:
    """Makes some rows of ``target`` compute ``scale * source(x) + offset``."""
    target.weight[rows] = scale * source.weight
    if target.bias is not None:
        target.bias[rows] = offset + (0 if source.bias is None else scale * source.bias)
