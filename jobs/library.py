"""Changes of what people own: datasets, captions, LoRAs, pictures. Called by the API and the admin.

Jobs start in `jobs/submission.py`, uploads in `jobs/uploads.py`.
Stored bytes are never deleted here: another row may name them.
"""

import logging
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import ProtectedError

from jobs.errors import Conflict
from jobs.models import Dataset, DatasetImage, GeneratedImage, InputImage, Lora, Style, User
from jobs.status import ACTIVE

logger = logging.getLogger(__name__)


def dataset_create(*, owner: User, name: str) -> Dataset:
    """A new, empty dataset.

    Raises:
        Conflict: This person has a dataset of that name.
    """
    try:
        with transaction.atomic():
            return Dataset.objects.create(owner=owner, name=name)
    except IntegrityError as error:
        raise Conflict(f"you have a dataset named {name!r} already: choose another name") from error


def dataset_delete(*, dataset: Dataset) -> None:
    """Remove a dataset with its pictures and versions.

    Raises:
        Conflict: A training used it, or it is being prepared.
    """
    with transaction.atomic():
        busy = dataset.versions.filter(job__state__in=ACTIVE).first()
        if busy is not None:
            raise Conflict(f"dataset {dataset.name!r} is being prepared (job {busy.job_id}): cancel that job first")
        try:
            dataset.delete()
        except ProtectedError as error:
            raise Conflict(f"dataset {dataset.name!r} was used by a training, so its pictures are kept") from error
    logger.info("dataset deleted id=%s", dataset.pk)


def dataset_image_caption(*, image: DatasetImage, caption: str) -> DatasetImage:
    """Set a picture's caption; frozen versions keep theirs."""
    image.caption = caption
    image.save(update_fields=["caption"])
    return image


def dataset_image_delete(*, image: DatasetImage) -> None:
    """Remove a picture from its dataset; frozen versions keep theirs."""
    image.delete()


def lora_update(*, lora: Lora, values: dict[str, Any]) -> Lora:
    """Change name, trigger word or visibility.

    Raises:
        Conflict: The owner has another LoRA of the new name.
    """
    for field, value in values.items():
        setattr(lora, field, value)
    try:
        with transaction.atomic():
            lora.save(update_fields=sorted(values))
    except IntegrityError as error:
        raise Conflict(f"you have a LoRA named {values.get('name')!r} already: choose another name") from error
    return lora


def lora_delete(*, lora: Lora) -> None:
    """Remove a LoRA with all its versions.

    Raises:
        Conflict: A generation used it.
    """
    try:
        with transaction.atomic():
            lora.delete()
    except ProtectedError as error:
        raise Conflict(
            f"LoRA {lora.name!r} was used to generate pictures, so it is kept; set its visibility to private instead"
        ) from error
    logger.info("lora deleted id=%s", lora.pk)


def generated_image_delete(*, image: GeneratedImage) -> None:
    """Remove one generated picture from its request."""
    image.delete()


def input_image_delete(*, image: InputImage) -> None:
    """Remove an uploaded picture; requests under way keep its bytes."""
    image.delete()


def style_save(*, style: Style, values: dict[str, Any]) -> Style:
    """Create or change a style.

    Raises:
        Conflict: Its owner has another one of that name.
    """
    for field, value in values.items():
        setattr(style, field, value)
    try:
        with transaction.atomic():
            style.save()
    except IntegrityError as error:
        raise Conflict(f"you have a style named {style.name!r} already: choose another name") from error
    return style


def style_delete(*, style: Style) -> None:
    """Remove a style; requests that used it keep its words."""
    style.delete()
