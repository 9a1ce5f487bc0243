"""The operator's pages: every record registered, one file per subject. Importing this package registers them."""

from jobs.admin import accounts, base_model, dataset, generation, home, job, lora, training, worker

__all__ = ["accounts", "base_model", "dataset", "generation", "home", "job", "lora", "training", "worker"]
