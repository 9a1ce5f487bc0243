"""The learning rate of a step, a pure function: nothing to save in a checkpoint."""

import math

from core.train_config import TrainConfig


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (0-based).

    1. Warm-up: rises in a line and reaches the peak at its last step.
    2. Constant: stays there.
    3. Linear, cosine or polynomial (squared): falls to zero, which it would reach one step after the last.
    4. Cosine with restarts: falls so `lr_cycles` times, each time from the peak.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps))  # 0..1
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_schedule == "polynomial":
        return config.learning_rate * (1 - progress) ** 2
    if config.lr_schedule == "cosine_with_restarts" and progress < 1:
        progress = progress * config.lr_cycles % 1
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
