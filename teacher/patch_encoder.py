"""The bundled VAE's encoder: principal components of 8x8-pixel patches, spelled out in ``AutoencoderKL``'s weights.

A small encoder takes long to learn what is known in closed form, so it is not learned. Three strided convolutions move
each patch's 8x8x3 values into channels and project them; residual branches are zero. The last normalisation divides by
a picture's own contrast, so a large constant in each group keeps that division constant, and SiLU is undone by
``silu(x) - silu(-x) = x``. The decoder is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PATCH = 8
CONSTANT = 64.0  # beside latents of about 1
DECODER_CONSTANT = 8.0  # beside colours from -1 to 1
LOG_VARIANCE = -12.0  # of the posterior: next to none


def principal_components(pictures: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 8, 8) and (count,): what maps a patch to its latent, and what is added.

    pictures: batches (N, 3, H, W) in [-1, 1], of any sizes. Components are scaled by their deviation to the power of
    -1/2, half-way between equal channels and equal pixels, then together to a mean variance of 1.
    """
    cut = [nn.functional.pixel_unshuffle(batch, PATCH).permute(0, 2, 3, 1).flatten(0, 2) for batch in pictures]
    patches = torch.cat(cut)
    mean = patches.mean(0)
    _, singular, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    deviation = singular[:count] / len(patches) ** 0.5
    weight = directions[:count] / (deviation * deviation.mean())[:, None].sqrt()
    return weight.unflatten(1, (3, PATCH, PATCH)), -weight @ mean


@torch.no_grad()
def set_encoder(vae: Any, weight: Tensor, bias: Tensor) -> None:
    """Makes ``vae``, an ``AutoencoderKL`` of four levels, encode each patch as ``weight . patch + bias``; see
    :func:`principal_components`."""
    encoder, count = vae.encoder, len(weight)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            module.bias.zero_()
    for module in encoder.modules():
        shortcut = getattr(module, "conv_shortcut", None)
        if isinstance(shortcut, nn.Conv2d):
            nn.init.dirac_(shortcut.weight)
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1
    first, second, third = (block.downsamplers[0].conv for block in encoder.down_blocks[:3])
    for convolution, channels in ((first, 3), (second, 12)):  # 2x2 cells into channels: c -> 4 c + 2 dy + dx
        for c in range(channels):
            for tap in range(4):
                convolution.weight[4 * c + tap, c, tap // 2, tap % 2] = 1
    # A pixel's row in its patch is 4 dy3 + 2 dy2 + dy1, as the third, second and first convolution see it.
    split = weight.unflatten(3, (2, 2, 2)).unflatten(2, (2, 2, 2))  # (K, c, y3, y2, y1, x3, x2, x1)
    taps = split.permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(count, 48, 2, 2)
    norm = encoder.conv_norm_out
    group = norm.num_channels // norm.num_groups
    free = [c for c in range(norm.num_channels) if c % group >= 2]
    for start in range(0, norm.num_channels, group):
        third.bias[start], third.bias[start + 1] = CONSTANT, -CONSTANT
    norm.weight.fill_((2 / group) ** 0.5 * CONSTANT)  # what the division takes away
    norm.bias.zero_()
    for k in range(count):
        plus, minus = free[2 * k], free[2 * k + 1]
        for channel, sign in ((plus, 1.0), (minus, -1.0)):
            third.weight[channel, :48, :2, :2] = sign * taps[k]
            third.bias[channel] = sign * bias[k]
            encoder.conv_out.weight[k, channel, 1, 1] = sign
    encoder.conv_out.bias[count:] = LOG_VARIANCE
    nn.init.dirac_(vae.quant_conv.weight)
    vae.quant_conv.bias.zero_()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


@torch.no_grad()
def start_decoder(vae: Any, weight: Tensor, bias: Tensor) -> None:
    """Makes an untrained decoder paint each patch in its mean colour, by the encoder's tricks; it learns the rest.

    Latents and colours pass unchanged through all levels, since residual branches start at zero.
    """
    decoder, count = vae.decoder, len(weight)
    for name, module in decoder.named_modules():
        if name.endswith("conv2"):
            module.weight.zero_()
            module.bias.zero_()
        elif name.endswith(("conv_shortcut", "upsamplers.0.conv")):
            nn.init.dirac_(module.weight)
            module.bias.zero_()
    nn.init.dirac_(vae.post_quant_conv.weight)
    vae.post_quant_conv.bias.zero_()
    inverse = torch.linalg.pinv(weight.flatten(1)).unflatten(0, (3, -1)).mean(1)  # (3, K)
    norm = decoder.conv_norm_out
    group = norm.num_channels // norm.num_groups
    last = decoder.up_blocks[-1].resnets[-1].conv2
    for start in range(0, norm.num_channels, group):
        last.bias[start], last.bias[start + 1] = DECODER_CONSTANT, -DECODER_CONSTANT
    norm.weight.fill_((2 / group) ** 0.5 * DECODER_CONSTANT)
    free = [c for c in range(norm.num_channels) if c % group >= 2]
    decoder.conv_in.weight.zero_()
    decoder.conv_in.bias.zero_()
    decoder.conv_out.weight.mul_(0.01)
    decoder.conv_out.bias.zero_()
    for colour in range(3):
        for channel, sign in zip(free[2 * colour : 2 * colour + 2], (1.0, -1.0), strict=True):
            decoder.conv_in.weight[channel, :, 1, 1] = sign * inverse[colour]
            decoder.conv_in.bias[channel] = -sign * inverse[colour] @ bias
            decoder.conv_out.weight[:, channel] = 0
            decoder.conv_out.weight[colour, channel, 1, 1] = sign
    for k, channel in enumerate(free[6 : 6 + count]):
        decoder.conv_in.weight[channel, k, 1, 1] = 1
