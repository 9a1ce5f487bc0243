"""When a failed call is worth another try, and how long to wait before it. Used by workers, never by the web tier.

Full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015): the wait is uniform between zero and the
growing cap, so that many workers that lost one server at the same moment do not come back at the same moment.
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError, ParamValidationError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import IncompleteReadError as BotoIncompleteReadError
from botocore.exceptions import ResponseStreamingError as BotoResponseStreamingError
from django.db import InterfaceError, OperationalError

from jobs.errors import ArtifactMissing

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHECK_SECONDS = 0.5
"""Longest sleep between two calls of `check`: a lost lease or a shutdown ends a wait within this time."""

TRANSIENT_ERRNO = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EPIPE,
        errno.EMFILE,
        errno.ENFILE,
    }
)
"""Of a disk, a network file system or a socket. ENOSPC and EDQUOT are absent: waiting frees no space."""

TRANSIENT_S3_CODES = frozenset(
    {
        "SlowDown",
        "RequestTimeout",
        "RequestTimeoutException",
        "InternalError",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "BandwidthLimitExceeded",
        "OperationAborted",
        "ConditionalRequestConflict",
        "NoSuchUpload",  # A sweep or another try aborted the multipart: the next one begins anew.
        "BadDigest",  # The bytes changed on their way.
        "XAmzContentChecksumMismatch",
        "IncompleteBody",
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later without anybody changing anything.

    True for connection errors, timeouts, HTTP 5xx, 429, 409, and the database's OperationalError. False for a full
    disk, missing permission, a missing or damaged object, and everything unknown.
    """
    if isinstance(error, ArtifactMissing):
        return True
    if isinstance(error, ClientError):
        return _is_transient_answer(error)
    if isinstance(error, NoCredentialsError | ParamValidationError):
        return False
    if isinstance(error, BotoConnectionError | HTTPClientError | BotoIncompleteReadError | BotoResponseStreamingError):
        return True
    if isinstance(error, BotoCoreError):
        return False
    if isinstance(error, OperationalError | InterfaceError):
        return not _is_disk_full(error)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRNO
    return False


def _is_transient_answer(error: ClientError) -> bool:
    answer = error.response
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status in (408, 409, 425, 429) or answer.get("Error", {}).get("Code") in TRANSIENT_S3_CODES


def _is_disk_full(error: Exception) -> bool:
    """SQLite's SQLITE_FULL and PostgreSQL's disk_full (class 53100) both come as OperationalError."""
    cause = error.__cause__
    return getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL" or getattr(cause, "sqlstate", "") == "53100"


def full_jitter(first_seconds: float, cap_seconds: float, tries: int, rng: random.Random) -> float:
    """Seconds to wait after so many tries (0, 1 ...): `uniform(0, min(cap, first * 2**tries))`."""
    # Beyond 2**60 the cap rules for sure, and the float would overflow some day.
    return rng.uniform(0, min(cap_seconds, first_seconds * 2 ** min(tries, 60)))


class Backoff:
    """Waits between tries: `uniform(0, min(cap, first * 2**n))`, until the budget is spent.

    Args:
        first_seconds: Upper end of the first wait.
        cap_seconds: Upper end of any wait.
        budget_seconds: From the construction on; afterwards `next_delay()` is None.
        clock: Seconds that never go back.
        rng: Where the jitter comes from.
    """

    def __init__(
        self,
        *,
        first_seconds: float = 0.5,
        cap_seconds: float = 60.0,
        budget_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.first_seconds, self.cap_seconds, self.budget_seconds = first_seconds, cap_seconds, budget_seconds
        self.tries = 0
        self._clock, self._rng = clock, rng or random.Random()
        self._end = clock() + budget_seconds

    @property
    def left_seconds(self) -> float:
        """What remains of the budget."""
        return max(0.0, self._end - self._clock())

    def next_delay(self) -> float | None:
        """Seconds to wait before the next try, or None when the budget is spent. Never beyond the budget's end."""
        left = self.left_seconds
        if left <= 0:
            return None
        delay = full_jitter(self.first_seconds, self.cap_seconds, self.tries, self._rng)
        self.tries += 1
        return min(left, delay)

    def __iter__(self) -> Iterator[float]:
        while (delay := self.next_delay()) is not None:
            yield delay


def retrying(
    call: Callable[[], Result],
    *,
    check: Callable[[], None] | None = None,
    backoff: Backoff | None = None,
    sleep: Callable[[float], None] = time.sleep,
    what: str = "call",
) -> Result:
    """Call until it succeeds, waiting after transient errors.

    Args:
        check: Called before each try and at least every half second of a wait; whatever it raises ends the wait.
        what: Named in the log.

    Raises:
        Exception: The first error that is not transient, or the last transient one when the budget is spent.
    """
    backoff = backoff or Backoff()
    while True:
        if check is not None:
            check()
        try:
            return call()
        except Exception as error:
            delay = backoff.next_delay() if is_transient(error) else None
            if delay is None:
                raise
            logger.warning("retry what=%s try=%d in_seconds=%.2f reason=%s", what, backoff.tries, delay, error)
        _wait(delay, check, sleep)


def _wait(seconds: float, check: Callable[[], None] | None, sleep: Callable[[float], None]) -> None:
    while seconds > 0:
        part = min(seconds, CHECK_SECONDS)
        sleep(part)
        seconds -= part
        if check is not None:
            check()
