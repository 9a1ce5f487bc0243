"""The VAE of the demo's base model: 64x64 pixels to 16x16 latents of 4 channels. Called by `demo.train_base`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from core.randomness import generator

BATCH = 8
KL_WEIGHT = 1e-6
"""1e-3 let a latent channel collapse."""
LEARNING_RATE = 1.5e-3
LATENT_CHANNELS = 4


def make_vae() -> Any:
    """0.65 M parameters, one ResNet layer per block, no attention; draws blurred colours from the first step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            sample_size=64,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=1,
            mid_block_add_attention=False,
        )
    _start_with_colour(vae)
    return vae.to(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class Sprites:
    """All emoji: (n, 4, 64, 64) in [0, 1], colours multiplied by alpha."""

    rgba: Tensor


def batch(sprites: Sprites, seed: int, step: int) -> Tensor:
    """(BATCH, 3, 64, 64) in [-1, 1]: moved, turned, recoloured, on plain or shaded backgrounds."""
    dice = generator(seed, "vae", step)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=dice) * (high - low) + low

    def chance(share: float) -> Tensor:
        return (torch.rand(BATCH, generator=dice) < share).float()

    chosen = sprites.rgba[torch.randint(len(sprites.rgba), (BATCH,), generator=dice)]  # (n, 4, 64, 64)
    moved = chance(0.5)
    scale, angle = 1 + moved * uniform(-0.3, 0.4, BATCH), moved * uniform(-0.4, 0.4, BATCH)
    shift = moved[:, None] * uniform(-0.25, 0.25, BATCH, 2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(matrix, list(chosen.shape), align_corners=False)
    chosen = functional.grid_sample(chosen, grid, align_corners=False)

    turned = _hue_turn(chance(0.4) * uniform(0, 2 * math.pi, BATCH))  # (n, 3, 3)
    colours = torch.einsum("nij,njhw->nihw", turned, chosen[:, :3]).clamp(0, 1)
    white = chance(0.4)[:, None, None, None]
    ground = white + (1 - white) * uniform(0, 1, BATCH, 3, 1, 1)
    other = uniform(0, 1, BATCH, 3, 1, 1)
    ramp = torch.linspace(0, 1, 64).view(1, 1, 64, 1) * chance(0.15)[:, None, None, None]
    ground = ground * (1 - ramp) + other * ramp
    pixels = colours + ground * (1 - chosen[:, 3:])
    inverted = chance(0.06)[:, None, None, None]
    pixels = pixels * (1 - inverted) + (1 - pixels) * inverted
    return (pixels.clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)


def loss(vae: Any, pixels: Tensor, seed: int, step: int) -> tuple[Tensor, float]:
    """What to minimise, and the mean squared error as PSNR in dB.

    Differences of colour channels count extra, also averaged over 4x4 pixels: without that the VAE stays for long in a
    plateau where it draws in grey.
    """
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator(seed, "vae noise", step))
    output = vae.decode(posterior.mean + posterior.std * noise).sample
    error = output - pixels  # (n, 3, 64, 64)
    opponent = torch.stack([error[:, 0] - error[:, 1], error[:, 2] - (error[:, 0] + error[:, 1]) / 2], 1)
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    squared = error.square().mean()
    total = error.abs().mean() + 2 * squared + 0.5 * (across.abs().mean() + down.abs().mean())
    total = total + 0.5 * opponent.abs().mean() + 2 * functional.avg_pool2d(opponent, 4).square().mean()
    total = total + functional.avg_pool2d(error, 4).square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return total + KL_WEIGHT * kl, float(10 * torch.log10(4 / squared.detach()))


@torch.no_grad()
def standardise(vae: Any, pixels: Tensor) -> None:
    """Fold mean and scale of each latent channel into the VAE's 1x1 convolutions, so that its scaling factor is 1."""
    moments = vae.encode(pixels).latent_dist
    mean, std = moments.mean.mean((0, 2, 3)), moments.mean.std((0, 2, 3))  # (c,), (c,)
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def _hue_turn(angle: Tensor) -> Tensor:
    """(n, 3, 3): rotation of colours about the grey axis by (n,) radians."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    same, part, rest = (1 - cos) / 3, sin / math.sqrt(3), cos
    rows = [
        [rest + same, same - part, same + part],
        [same + part, rest + same, same - part],
        [same - part, same + part, rest + same],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@torch.no_grad()
def _start_with_colour(vae: Any) -> None:
    """Weights that pass the mean colour of each 4x4 block through the whole net.

    From random weights a net so small learns brightness first and stays in grey for most of its training. Here three
    channels of the residual stream carry the colours, two constant ones (+3 and -3) pin the scale of the group norms
    (one group), and the residual branches start at zero. The output layers see silu(x) - silu(-x) = x.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            module.weight.zero_()
            module.bias.zero_()
        elif name.endswith(("conv_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")):
            module.weight *= 0.35
            module.bias *= 0.35
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25
    corner = torch.zeros(3, 3)
    corner[0, 0] = 1
    smooth = torch.tensor([1.0, 2.0, 1.0])
    smooth = torch.outer(smooth, smooth) / 16
    gain = 1.15  # makes up for what the last group norm takes

    def colours(sign: float = 1.0, begin: int = 0) -> list[tuple[int, int, float]]:
        return [(begin + channel, channel, sign) for channel in range(3)]

    def constants(width: int, before: int) -> list[tuple[int, int, float]]:
        return [(width - 2, before - 2, 1.0), (width - 1, before - 1, 1.0)]

    narrow, middle, wide = (block.resnets[-1].conv2.out_channels for block in encoder.down_blocks)
    for convolution, width in ((encoder.conv_in, narrow), (decoder.conv_in, wide)):
        _route(convolution, colours())
        convolution.weight[width - 2 :] = 0
        convolution.bias[width - 2 :] = torch.tensor([3.0, -3.0])
    for block, width in ((encoder.down_blocks[0], narrow), (encoder.down_blocks[1], middle)):
        _route(block.downsamplers[0].conv, colours(), mean)
        _route(block.downsamplers[0].conv, constants(width, width), corner)
    _route(encoder.down_blocks[1].resnets[0].conv_shortcut, colours() + constants(middle, narrow))
    twice = [(into, out, 2.0) for into, out, _ in constants(wide, middle)]
    _route(encoder.down_blocks[2].resnets[0].conv_shortcut, colours() + colours(-1.0, begin=3) + twice)
    encoder.conv_out.weight *= 0.5
    _route(encoder.conv_out, [pair for c in range(3) for pair in ((c, c, gain), (c, 3 + c, -gain))])
    encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.2
    encoder.conv_out.bias[LATENT_CHANNELS:] = -5.5  # log variance: hardly any noise
    for mix in (vae.quant_conv, vae.post_quant_conv):
        mix.weight.copy_(torch.eye(mix.out_channels)[..., None, None])
        mix.bias.zero_()
    for block, width in ((decoder.up_blocks[0], wide), (decoder.up_blocks[1], middle)):
        _route(block.upsamplers[0].conv, colours(), smooth)
        _route(block.upsamplers[0].conv, constants(width, width))
    _route(decoder.up_blocks[1].resnets[0].conv_shortcut, colours() + constants(middle, wide))
    last = decoder.up_blocks[2].resnets[0].conv_shortcut
    _route(last, colours() + colours(-1.0, begin=3) + constants(narrow, middle))
    decoder.conv_out.weight *= 0.1
    decoder.conv_out.weight[:, :6] = 0
    decoder.conv_out.bias.zero_()
    for channel in range(3):
        decoder.conv_out.weight[channel, channel, 1, 1] = gain
        decoder.conv_out.weight[channel, 3 + channel, 1, 1] = -gain


def _route(convolution: Any, pairs: list[tuple[int, int, float]], kernel: Tensor | None = None) -> None:
    """Output channels that are the given input channels times a factor, through `kernel` or their middle alone."""
    for out in {out for out, _, _ in pairs}:
        convolution.weight[out] = 0
        convolution.bias[out] = 0
    for out, into, factor in pairs:
        if convolution.weight.shape[-1] == 1:
            convolution.weight[out, into, 0, 0] = factor
        elif kernel is None:
            convolution.weight[out, into, 1, 1] = factor
        else:
            convolution.weight[out, into] = kernel * factor
