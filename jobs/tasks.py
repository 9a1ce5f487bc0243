"""The Celery tasks: one per job kind, without arguments. With `lorasite/celery.py` the only importer of `gpu_worker`.

The imports stand inside the bodies so that the web tier and a cpu worker never load torch.
"""

from functools import partial

from celery import shared_task

from jobs.doorbells import task_name
from jobs.drain import drain
from jobs.status import JobKind
from jobs.work.generate import GenerateWork, compute_as_they_come
from jobs.work.import_lora import ImportLoraWork
from jobs.work.prepare_base import PrepareBaseWork
from jobs.work.preprocess import PreprocessWork
from jobs.work.train import TrainWork


@shared_task(name=task_name(JobKind.PREPROCESS))
def preprocess() -> None:
    """Queue cpu: uploaded pictures become a frozen dataset version."""
    from gpu_worker.preprocessing import run_preprocess

    drain(JobKind.PREPROCESS, partial(PreprocessWork, run=run_preprocess))


@shared_task(name=task_name(JobKind.IMPORT_LORA))
def import_lora() -> None:
    """Queue cpu: an uploaded file becomes a LoRA version."""
    drain(JobKind.IMPORT_LORA, ImportLoraWork)


@shared_task(name=task_name(JobKind.PREPARE_BASE))
def prepare_base() -> None:
    """Queue gpu: a base model's folder becomes a prepared one."""
    from gpu_worker.base_preparation import run_base_preparation

    drain(JobKind.PREPARE_BASE, partial(PrepareBaseWork, run=run_base_preparation))


@shared_task(name=task_name(JobKind.TRAIN))
def train() -> None:
    """Queue gpu: a dataset version becomes a LoRA."""
    from gpu_worker.training import run_training

    drain(JobKind.TRAIN, partial(TrainWork, run=run_training))


@shared_task(name=task_name(JobKind.GENERATE))
def generate() -> None:
    """Queue gpu: a prompt becomes pictures."""
    from gpu_worker.generation import Order, run_generations

    drain(JobKind.GENERATE, partial(GenerateWork, run=run_generations, order=Order), compute_as_they_come)
