"""The table of faults: every exception that a job may end with has exactly one consequence."""

import errno

import pytest
import torch
from botocore.exceptions import ClientError, EndpointConnectionError
from django.db import IntegrityError, OperationalError

from core.errors import Cancelled, CheckpointMismatch, ConfigError, Paused, TrainingDiverged
from jobs.errors import ArtifactDamaged, ArtifactMissing, InvalidInput, LeaseLost
from jobs.faults import Remedy, fault_of
from jobs.heartbeat import DeadlinePassed, Fenced, Preempted


def answer(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("error", "remedy", "code"),
    [
        (Fenced("lost"), Remedy.DROP, "lease_lost"),
        (LeaseLost("lost"), Remedy.DROP, "lease_lost"),
        (Cancelled("stop"), Remedy.CANCEL, "cancelled"),
        (Paused("going down"), Remedy.RELEASE, "released"),
        (Preempted("interactive work"), Remedy.PREEMPT, "preempted"),
        (DeadlinePassed("too long"), Remedy.FAIL, "deadline"),
        (ConfigError("no"), Remedy.FAIL, "invalid_config"),
        (InvalidInput("no"), Remedy.FAIL, "invalid"),
        (TrainingDiverged("nan"), Remedy.FAIL, "nan"),
        (CheckpointMismatch("other"), Remedy.FAIL, "checkpoint_mismatch"),
        (ArtifactDamaged("other bytes"), Remedy.FAIL, "artifact_damaged"),
        (ArtifactMissing("collected"), Remedy.WAIT, "store_unavailable"),
        (ConnectionResetError("peer"), Remedy.WAIT, "store_unavailable"),
        (TimeoutError("slow"), Remedy.WAIT, "store_unavailable"),
        (EndpointConnectionError(endpoint_url="http://s3"), Remedy.WAIT, "store_unavailable"),
        (answer(503, "SlowDown"), Remedy.WAIT, "store_unavailable"),
        (answer(403, "AccessDenied"), Remedy.ONCE_MORE, "internal"),
        (OSError(errno.ENOSPC, "full"), Remedy.FREE_DISK, "disk_full"),
        (OSError(errno.EDQUOT, "quota"), Remedy.FREE_DISK, "disk_full"),
        (OperationalError("server closed the connection"), Remedy.ABANDON, "database"),
        (IntegrityError("unique"), Remedy.ONCE_MORE, "internal"),
        (MemoryError(), Remedy.SAVE_MEMORY, "oom"),
        (torch.OutOfMemoryError("CUDA out of memory."), Remedy.SAVE_MEMORY, "oom"),
        (RuntimeError("CUDA error: out of memory"), Remedy.SAVE_MEMORY, "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), Remedy.SAVE_MEMORY, "oom"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Remedy.NEW_PROCESS, "device_error"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Remedy.NEW_PROCESS, "device_error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), Remedy.NEW_PROCESS, "device_error"),
        (torch.AcceleratorError("device-side assert triggered"), Remedy.NEW_PROCESS, "device_error"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Remedy.ONCE_MORE, "internal"),
        (KeyError("x"), Remedy.ONCE_MORE, "internal"),
        (PermissionError(errno.EACCES, "no"), Remedy.ONCE_MORE, "internal"),
    ],
    ids=lambda value: f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value),
)
def test_an_exception_has_its_remedy(error: Exception, remedy: Remedy, code: str) -> None:
    fault = fault_of(error)
    assert (fault.remedy, fault.code) == (remedy, code)
    assert fault.message


def test_a_surprise_shows_its_kind_to_people_and_not_its_words() -> None:
    assert "secret" not in fault_of(KeyError("secret")).message
