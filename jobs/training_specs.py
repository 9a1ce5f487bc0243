"""What a training's configuration may say when it comes from a person through the site.

Called by `jobs/submission.py`; writes nothing.
"""

from core.prompt_syntax import parse_prompt
from core.train_config import TrainConfig
from jobs import quotas
from jobs.errors import InvalidInput
from jobs.models import BaseModel


def refuse_training(config: TrainConfig) -> None:
    """Refuse what no worker should be asked for.

    Raises:
        InvalidInput: It shows too many pictures, or names a LoRA in a sample prompt.
    """
    quotas.refuse_oversized_training(config)
    for prompt in config.sample_prompts:
        if named := parse_prompt(prompt).loras:
            raise InvalidInput(f"a sample prompt names LoRA {named[0][0]!r}: samples show the LoRA being trained alone")


def refuse_misfit(base_model: BaseModel, config: TrainConfig) -> None:
    """Refuse what this base model cannot learn.

    Raises:
        InvalidInput: Zero terminal SNR for a base that predicts the noise.
    """
    if config.zero_terminal_snr and (base_model.facts or {}).get("prediction_type") == "epsilon":
        raise InvalidInput(
            f"zero_terminal_snr is for bases that predict v, {base_model.name!r} predicts the noise: leave it out"
        )
