"""What a picture's caption is in a step: dropped, shuffled or as it stands, a pure function of (seed, step, sample).

Called by `core.diffusion_loss`; knows no tensors but the dice.
"""

import torch

from core.randomness import generator, uniform
from core.train_config import TrainConfig


def caption_at(caption: str, config: TrainConfig, step: int, sample: int) -> str:
    """The caption that one sample of a step trains with.

    Args:
        caption: As the manifest says it.
        config: Caption dropout, shuffling, kept parts, separator and seed are read.
        step: Optimizer step, 0-based.
        sample: Place in the effective batch, 0-based.
    """
    if uniform(config.seed, "caption dropout", step, sample) < config.caption_dropout:
        return ""
    return shuffled(caption, config, step, sample) if config.shuffle_captions else caption


def shuffled(caption: str, config: TrainConfig, step: int, sample: int) -> str:
    """The parts of a caption in another order, the first `keep_tokens` of them at their places.

    Parts stand between separators, spaces around them do not count; empty parts go. So kohya's scripts do it, too.
    """
    separator = config.caption_separator
    parts = [part.strip() for part in caption.split(separator) if part.strip()]
    kept, rest = parts[: config.keep_tokens], parts[config.keep_tokens :]
    order = torch.randperm(len(rest), generator=generator(config.seed, "caption order", step, sample)).tolist()
    return f"{separator.rstrip()} ".join(kept + [rest[place] for place in order])
