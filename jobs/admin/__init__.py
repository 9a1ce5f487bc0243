"""The operator's pages: every record registered, one file per subject. Importing this package registers them."""

from jobs.admin import (
    accounts,
    artifact,
    base_model,
    dataset,
    generation,
    guidance,
    home,
    job,
    job_history,
    lora,
    lora_import,
    training,
    worker,
)

__all__ = [
    "accounts",
    "artifact",
    "base_model",
    "dataset",
    "generation",
    "guidance",
    "home",
    "job",
    "job_history",
    "lora",
    "lora_import",
    "training",
    "worker",
]
