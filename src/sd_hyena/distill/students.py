"""Building the operators to be taught, and starting them from their teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..api import choose_layers
from ..errors import UsageError
from ..hyena_file import HyenaFile
from ..nn import Hyena2D, HyenaOperator, OperatorConfig
from ..nn.attention import projections_of
from ..patch import check_replaceable
from ..targets import Target
from .capture import Captured

logger = logging.getLogger(__name__)
MAX_FIT_TOKENS = 1024  # attention maps are measured on grids up to this size; larger ones are pooled


class Students(nn.Module):
    """The operators of all selected layers, run side by side on captured inputs."""

    def __init__(self, operators: Mapping[str, nn.Module], attentions: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(operators)
        self.operators = nn.ModuleList(operators.values())
        self._attentions = (dict(attentions),)  # frozen teacher layers: not ours to register

    def items(self) -> list[tuple[str, nn.Module]]:
        return list(zip(self.names, self.operators, strict=True))

    def forward(self, records: Mapping[str, Captured]) -> dict[str, Tensor]:
        """Each layer's output (B, h * w, D) for the teacher's input to it."""
        outputs = {}
        for name, operator in self.items():
            record = records[name]
            if getattr(operator, "form", "full") == "core":
                outputs[name] = operator(record.x, record.size, projections_of(self._attentions[0][name]))
            else:
                outputs[name] = operator(record.x, record.size)
        return outputs


def configure(target: Target, latent_grid: tuple[int, int], unet: nn.Module, **choices: Any) -> OperatorConfig:
    """The operator for one layer of ``unet``, of which no weights are needed; ``choices`` are OperatorConfig
    fields. Raises UsageError if they do not fit the layer."""
    height, width = target.grid(latent_grid)
    check_replaceable(unet, target)
    attention = unet.get_submodule(target.path)
    try:
        config = OperatorConfig(
            dim=target.dim,
            height=height,
            width=width,
            inner_dim=0 if target.inner_dim == target.dim else target.inner_dim,
            attention_heads=target.heads,
            in_bias=getattr(attention.to_q, "bias", None) is not None,
            **choices,
        )
        with torch.device("meta"):
            config.build()
    except ValueError as error:
        raise UsageError(f"hyena settings do not fit layer {target.name}: {error}") from None
    return config


def pretrained_layers(
    file: HyenaFile, unet: nn.Module, target: str, targets: Sequence[Target]
) -> dict[str, tuple[OperatorConfig, dict[str, Tensor]]]:
    """Configuration and weights of ``targets`` from a Hyena file. Raises UsageError if it lacks one of them."""
    chosen = {name: stored for stored, name in choose_layers(unet, file, target).items()}
    missing = [t.name for t in targets if t.name not in chosen]
    if missing:
        raise UsageError(f"{file.path}: holds no layer {', '.join(missing)}; it has {', '.join(file.layers)}")
    logger.warning(
        "%s sets the operators: the --hyena_*, --operator, --form, --global_branch, --feature_map, --num_features "
        "and --init options do not apply",
        file.path,
    )
    return {name: (file.layers[stored].config, file.tensors[stored]) for name, stored in chosen.items()}


@torch.no_grad()
def start_from_teacher(operator: nn.Module, attention: nn.Module, records: Sequence[Captured]) -> None:
    """Gives an operator the start that makes step 0 sensible.

    Projections come from to_q, to_k, to_v and to_out. For ``Hyena2D`` the gates start at 1, the short
    filter at the identity, and the kernel at the teacher's mean attention as a function of relative
    position, measured on ``records``, or at zero without any. A causal operator takes what it can: its value
    projection, the output projection and gates of 1.
    """
    value, out = attention.to_v, projections_of(attention)[3]
    order = operator.order
    if getattr(operator, "form", "full") == "full":
        weights = [attention.to_q.weight, *[attention.to_k.weight] * (order - 1), value.weight]
        operator.in_proj.weight.copy_(torch.cat(weights))
        if operator.in_proj.bias is not None:
            biases = [layer.bias for layer in (attention.to_q, *[attention.to_k] * (order - 1), value)]
            operator.in_proj.bias.copy_(
                torch.cat([torch.zeros_like(value.weight[:, 0]) if b is None else b for b in biases])
            )
        operator.out_proj.weight.copy_(out.weight)
        operator.out_proj.bias.copy_(torch.zeros_like(out.weight[:, 0]) if out.bias is None else out.bias)
    if isinstance(operator, Hyena2D):
        _start_hyena2d(operator, attention, records)
    elif isinstance(operator, HyenaOperator):
        _start_causal(operator, value.weight)


def _start_causal(operator: nn.Module, value: Tensor) -> None:
    gated = operator.in_proj.weight.shape[0] - value.shape[0]
    operator.in_proj.weight[:gated] = 0
    operator.in_proj.bias.zero_()
    operator.in_proj.bias[:gated] = 1
    operator.short_filter.weight.zero_()
    operator.short_filter.weight[..., -1] = 1
    operator.short_filter.bias.zero_()


def _start_hyena2d(operator: Hyena2D, attention: nn.Module, records: Sequence[Captured]) -> None:
    operator.reset_short_filter()
    operator.gate.weight.zero_()
    operator.bias.weight.zero_()
    operator.bias.weight[:-1] = 1  # every convolution but the last starts as the identity
    if not records:
        operator.filter.zero_()
        return
    kernel, flat = mean_attention(attention, records, operator.filter.extent)
    if operator.global_branch == "none":
        kernel = kernel + flat[:, None, None] / (operator.filter.extent[0] * operator.filter.extent[1])
    else:
        operator.gain.weight.copy_(flat.repeat_interleave(operator.inner_dim // len(flat)).view(1, 1, -1, 1, 1))
    channels = kernel.repeat_interleave(operator.inner_dim // len(kernel), dim=0)
    shared = channels.view(operator.num_heads, -1, *channels.shape[1:]).mean(0)
    identity = torch.zeros_like(shared).repeat(operator.order - 2, 1, 1)
    operator.filter.fit_(torch.cat([identity, shared]))


@torch.no_grad()
def mean_attention(attention: nn.Module, records: Sequence[Captured], extent: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The teacher's mean attention by relative position, split into a local kernel and a flat part.

    Returns the kernel (heads, 2h - 1, 2w - 1) on the training grid and the flat part's mass (heads,), in
    [0, 1]: the share of attention that distance does not explain, taken as the median over offsets.
    Grids above ``MAX_FIT_TOKENS`` are pooled first and the kernel is interpolated back.
    """
    heads = attention.heads
    factor = 1
    while (extent[0] // factor) * (extent[1] // factor) > MAX_FIT_TOKENS:
        factor *= 2
    h, w = max(1, extent[0] // factor), max(1, extent[1] // factor)
    total = torch.zeros(heads, 2 * h - 1, 2 * w - 1)
    index = _relative_index(h, w)
    for record in records:
        x = record.x.transpose(1, 2).unflatten(2, record.size).float()
        x = nn.functional.adaptive_avg_pool2d(x, (h, w)).flatten(2).transpose(1, 2).to(record.x.dtype)
        for sample in x:
            q, k = (
                layer(sample).float().unflatten(-1, (heads, -1)).transpose(0, 1)
                for layer in (attention.to_q, attention.to_k)
            )
            scores = (q @ k.transpose(1, 2) * attention.scale).softmax(-1).cpu()
            total.view(heads, -1).index_add_(1, index.flatten(), scores.flatten(1))
    count = torch.zeros(total[0].numel()).index_add_(0, index.flatten(), torch.ones(index.numel()))
    samples = sum(len(r.x) for r in records)
    kernel = total / (count.view(2 * h - 1, 2 * w - 1) * samples)
    flat = kernel.flatten(1).median(1).values
    kernel = kernel - flat[:, None, None]
    size = (2 * extent[0] - 1, 2 * extent[1] - 1)
    if (h, w) != tuple(extent):
        kernel = nn.functional.interpolate(kernel[None], size, mode="bilinear", align_corners=True)[0] / factor**2
    return kernel, flat * (h * w)


def _relative_index(h: int, w: int) -> Tensor:
    """Flat index of the offset query - key in a (2h - 1, 2w - 1) kernel, for every pair: (L, L)."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    dy = y.flatten()[:, None] - y.flatten()[None] + h - 1
    dx = x.flatten()[:, None] - x.flatten()[None] + w - 1
    return dy * (2 * w - 1) + dx
