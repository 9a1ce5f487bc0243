"""The UNet of the demo's base model and its training loss. Called by `demo.train_base`."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from core.randomness import generator


def make_unet(text_width: int) -> Any:
    """7.8 M parameters, cross-attention at all three resolutions so that a LoRA reaches fine detail.

    The pooled text also enters the time embedding: without it, a model so small ignored its prompts for long.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 96, 160),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=text_width,
            attention_head_dim=4,
            norm_num_groups=16,
            addition_embed_type="text",
            addition_embed_type_num_heads=8,
        )
    with torch.no_grad():  # residual branches and the output start at zero
        for name, module in unet.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):
                module.weight.zero_()
                module.bias.zero_()
    return unet.to(memory_format=torch.channels_last)


def training_loss(unet: Any, latents: Tensor, text: Tensor, alpha_bar: Tensor, seed: int, step: int) -> Tensor:
    """Mean squared error of v (arXiv 2202.00512); timesteps spread evenly over the batch, more of them noisy.

    Args:
        latents: (n, c, h, w).
        text: (n, tokens, width).
        alpha_bar: (timesteps,).
    """
    dice = generator(seed, "denoise", step)
    count = len(latents)
    spread = (torch.arange(count) + torch.rand(count, generator=dice)) / count  # (n,) in [0, 1)
    timesteps = (spread**0.8 * len(alpha_bar)).long()[torch.randperm(count, generator=dice)]
    noise = torch.randn(latents.shape, generator=dice)
    signal, level = alpha_bar[timesteps].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[timesteps]).sqrt().view(-1, 1, 1, 1)
    noisy = (signal * latents + level * noise).contiguous(memory_format=torch.channels_last)
    predicted = unet(noisy, timesteps, text).sample
    return (predicted - (signal * noise - level * latents)).square().mean()
