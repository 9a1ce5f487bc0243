"""All records of the product, one file per subject."""

from jobs.models.accounts import ApiKey, OwnerUsage, User
from jobs.models.artifact import Artifact
from jobs.models.base_model import BaseModel
from jobs.models.dataset import Dataset, DatasetImage, DatasetVersion
from jobs.models.generation import GeneratedImage, GenerationLora, GenerationRequest
from jobs.models.guidance import InputImage, Style
from jobs.models.job import Job, JobAttempt, JobEvent, JobPreview
from jobs.models.lora import Lora, LoraVersion
from jobs.models.lora_import import LoraImport
from jobs.models.training import TrainingRun
from jobs.models.worker import LeaderLease, WorkerProcess

__all__ = [
    "ApiKey",
    "Artifact",
    "BaseModel",
    "Dataset",
    "DatasetImage",
    "DatasetVersion",
    "GeneratedImage",
    "GenerationLora",
    "GenerationRequest",
    "InputImage",
    "Job",
    "JobAttempt",
    "JobEvent",
    "JobPreview",
    "LeaderLease",
    "Lora",
    "LoraImport",
    "LoraVersion",
    "OwnerUsage",
    "Style",
    "TrainingRun",
    "User",
    "WorkerProcess",
]
