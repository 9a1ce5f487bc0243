"""Errors and interruptions of `core`. Every text says what was wrong, the value, and what to do."""


class CoreError(Exception):
    """Base class of expected failures in `core`. Do not raise directly.

    `code` is the short, stable word that a job row and the API show next to the sentence.
    """

    code = "core_error"


class ConfigError(CoreError):
    """A configuration value, or a combination of them, makes no sense."""

    code = "invalid_config"


class ImageRejected(CoreError):
    """A file is not a picture that we accept (wrong content, broken, too large, too small)."""

    code = "image_rejected"


class DatasetError(CoreError):
    """A prepared dataset is missing, damaged or empty."""

    code = "dataset_error"


class BaseModelError(CoreError):
    """A base model folder is missing, damaged, or of a family that we do not serve."""

    code = "base_model_error"


class LoraFileError(CoreError):
    """A LoRA file is damaged, unsafe, or does not fit the base model."""

    code = "lora_file_error"


class CheckpointMismatch(CoreError):
    """A checkpoint belongs to another dataset, configuration or base model."""

    code = "checkpoint_mismatch"


class TrainingDiverged(CoreError):
    """The loss or the weights became NaN or infinite."""

    code = "nan"


class Interrupted(Exception):
    """Raised by a `report` callable to stop the work between two steps. Not an error."""


class Cancelled(Interrupted):
    """The person asked to stop: keep nothing but what is already saved."""


class Paused(Interrupted):
    """The worker must go (shutdown, preemption): save a checkpoint at this step, then stop."""
