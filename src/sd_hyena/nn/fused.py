"""``Hyena2D`` inference by fused kernels, channels first, where Triton runs.

The same sums as :meth:`Hyena2D.forward`, which stays the definition. The projections write and read channels
first, so nothing is ever turned round; short filter and first gate are one kernel, the convolution is one where
:mod:`sd_hyena.ops.dispatch` finds one, and the last gate is part of it or of the global branch's. Some channels
are worked on at a time, so the (N + 1) D wide tensor never exists whole where memory matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import dispatch, environment
from .projections import Projection, is_plain, wants_gradient

if TYPE_CHECKING:
    from .hyena2d import Hyena2D

PLANES = 512  # fill a large GPU where one program takes a whole plane
PROJECTED = 2**24  # projected elements that exist at once, beyond what fills the GPU
SHARE = 3 / 8  # of the channels: what is worked on takes twice the input, all of the layer less than attention
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def suits(operator: Hyena2D, x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether this path takes the call. On a CPU it does only where a kernel is asked for by name and Triton
    interprets; what keeps a layer from it elsewhere is logged once."""
    if x.device.type == "cpu" and environment.kernel() in ("", dispatch.FFT.name):
        return False
    kernels = dispatch.kernels()
    if kernels is None or kernels.launch.refuses(x.device):
        return False
    if wants_gradient(operator, x, projections):
        return False
    reason = refuses(operator, x, projections)
    if reason:
        dispatch.log(f"a Hyena layer runs without fused kernels: {reason}")
    return not reason


def refuses(operator: Hyena2D, x: Tensor, projections: Sequence[Projection]) -> str:
    """What about this layer or call the kernels cannot take, or ""."""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if x.dtype not in TYPES:
        return f"{x.dtype}"
    if x.dtype == torch.float32 and operator.global_branch == "linear" and x.device.type == "cuda":
        return "its linear attention is in float32, which tensor cores have no products for"
    if operator.order != 2:
        return f"its order is {operator.order}"
    if operator.global_branch == "linear" and operator.features.kind != "exp":
        return f"its feature map is {operator.features.kind}"
    if not is_plain(operator.short_filter, nn.Conv2d):
        return "its short filter does more than its weights say"
    if not all(is_plain(layer, nn.Linear) for layer in projections):
        return "its projections do more than their weights say"
    if any(p.dtype != x.dtype for layer in projections for p in layer.parameters()):  # type: ignore[attr-defined]
        return "its projections are of another type than its input"
    return ""


def forward(operator: Hyena2D, x: Tensor, size: tuple[int, int], inputs: Sequence[Any], out: Any) -> Tensor:
    """As :meth:`Hyena2D.forward`, without gradients, by plain linear layers.

    x: (B, h * w, D) -> (B, h * w, D); size: (h, w).
    """
    with torch.no_grad(), dispatch.kernels().launch.on(x.device):
        b, cells, _ = x.shape
        inner = operator.inner_dim
        radius = operator.filter.radius(size)
        case = dispatch.Case(x.device, x.dtype, size, radius, operator.global_branch == "mean")
        backend = dispatch.choose(case)
        weights, biases = _parts(inputs, inner)
        tokens = x.transpose(1, 2)
        groups = operator.channel_groups(channels_at_once(inner, b, cells), least=16)
        plan = memory_plan(operator, size, x, groups[0].stop, backend)
        workspace: dict[int | str, Tensor] = {}
        y = None
        for channels in groups:
            parts = _project_and_gate(operator, tokens, weights, biases, size, channels)
            if y is None:  # not before the first projections are gone
                y = x.new_empty(b, inner, *size)
            spectrum = operator.spectrum(size, 0, channels, plan, workspace, backend)
            _convolve_and_gate(operator, *parts, backend, spectrum, channels, y[:, channels])
            del parts  # or they would still be there beside the next ones
        assert y is not None
        return _project_out(out, y.flatten(2))


def _project_and_gate(
    operator: Hyena2D,
    tokens: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    size: tuple[int, int],
    channels: slice,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(u, q, k) of some channels, after short filter and first gate, (B, C, h, w) each; k where it is needed later.

    tokens: (B, D, h w).
    """
    short, scale = operator.short_filter, operator.gate.weight[1, 0, channels, 0, 0]
    weight, offset = _of(weights, channels), None if biases is None else _of(biases, channels)
    b, _, cells = tokens.shape
    p = weight @ tokens[0] if b == 1 else torch.bmm(weight.expand(b, -1, -1), tokens)
    taps = _of(short.weight.unflatten(0, (3, -1)), channels)[:, 0]
    bias = _of(short.bias.unflatten(0, (3, -1)), channels)
    signal = torch.float32 if p.dtype == torch.float32 else torch.float16  # finer than bfloat16, and what is multiplied
    keys = operator.global_branch == "linear"
    return dispatch.kernels().short_gate.short_gate(p.view(b, -1, cells), offset, taps, bias, scale, size, signal, keys)


def _convolve_and_gate(
    operator: Hyena2D,
    u: Tensor,
    q: Tensor,
    k: Tensor | None,
    backend: dispatch.Backend,
    spectrum: Tensor,
    channels: slice,
    out: Tensor,
) -> None:
    """The convolution of u, the global branch and the last gate, into ``out``: (B, C, h, w), all of them."""
    kernels = dispatch.kernels()
    radius, scale = operator.filter.radius((u.shape[2], u.shape[3])), operator.gate.weight[0, 0, channels, 0, 0]
    if k is None and backend.gated:
        backend.convolve(u, spectrum, radius, gate=(q, scale), out=out)
        return
    y = backend.convolve(u, spectrum, radius).contiguous()
    if k is None:
        kernels.short_gate.gate(y, q, scale, out)
        return
    width = inner_width(operator)
    heads = slice(channels.start // width, channels.stop // width)
    maps = [(m.weight[heads], m.bias[heads]) for m in (operator.features.query, operator.features.key)]
    kernels.features.attend_and_gate(q, k, u, y, *maps, operator.gain.weight[0, 0, channels, 0, 0], scale, out)


def inner_width(operator: Hyena2D) -> int:
    """Channels of one attention head."""
    return operator.inner_dim // operator.attention_heads


def _parts(layers: Sequence[Any], inner: int) -> tuple[Tensor, Tensor | None]:
    """The weights of q, k and v as one (3, inner, D), and their biases (3, inner) if there are any."""
    weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight.unflatten(0, (3, inner)), None
    biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    bias = biases[0] if len(layers) == 1 else torch.cat(biases)
    return weight.unflatten(0, (3, inner)), bias.unflatten(0, (3, inner))


def _of(parts: Tensor, channels: slice) -> Tensor:
    """Some channels of all three parts, (3 C, ...): a view if they are all."""
    return parts[:, channels].flatten(0, 1)


def channels_at_once(inner: int, images: int, cells: int) -> int:
    """How many channels are worked on together."""
    least = -(-PLANES // images) if cells <= dispatch.LARGEST_FLASH**2 else 1
    channels = min(inner, max(least, min(PROJECTED // (3 * images * cells), int(SHARE * inner))))
    return min(channels, inner // 8) if environment.low_memory() else channels


def memory_plan(operator: Hyena2D, size: tuple[int, int], x: Tensor, channels: int, backend: dispatch.Backend) -> Any:
    """All spectra are kept, or with low memory those that fit below attention's memory."""
    if environment.low_memory():
        working = 6 * x.element_size() * len(x) * size[0] * size[1] * channels
        return operator.plan_memory(size, x.nbytes, channels, working, backend)
    return operator.keep_all()


def _project_out(layer: Any, y: Tensor) -> Tensor:
    """(B, inner, L) -> (B, L, D), by the layer's weight as it lies."""
    if len(y) == 1 and layer.bias is not None:
        return torch.addmm(layer.bias, y[0].T, layer.weight.T)[None]
    z = torch.bmm(y.transpose(1, 2), layer.weight.T.expand(len(y), -1, -1))
    return z if layer.bias is None else z.add_(layer.bias)
