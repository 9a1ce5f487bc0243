"""The dispatcher: watches the database, rings doorbells, repairs what crashes left behind. Of several, one leads.

Front: `manage.py dispatch`.
"""

import logging
import os
import socket
import threading
import time

from django.conf import settings
from django.db import DatabaseError, connection, transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from jobs import recovery
from jobs.database_clock import after
from jobs.doorbells import Doorbells
from jobs.models import LeaderLease
from jobs.queue import waiting_by_kind
from jobs.status import QUEUES, JobKind
from jobs.workers import live_workers, silent_workers_mark_gone

logger = logging.getLogger(__name__)

ROLE = "dispatcher"
LEADER_LEASE_SECONDS = 10.0
BEAT_SECONDS = 2.0
SWEEP_SECONDS = 1.0
DOORBELLS_PER_WORKER = 2


def leader_age_seconds() -> float | None:
    """Seconds since a dispatcher was last heard, by the database's clock; None when none ever ran."""
    row = LeaderLease.objects.filter(role=ROLE).annotate(now=Now()).values_list("now", "beat_at").first()
    return None if row is None else (row[0] - row[1]).total_seconds()


class Dispatcher:
    """One dispatcher process."""

    def __init__(self, doorbells: Doorbells | None = None) -> None:
        self.holder = f"{socket.gethostname()}:{os.getpid()}"
        self._doorbells = doorbells or Doorbells()
        self._leads = False
        self._beat_due = 0.0
        self._sweep_due = 0.0

    def run(self, stop: threading.Event) -> None:
        """Tick until told to stop. A database that does not answer is waited for."""
        logger.info("dispatcher started holder=%s", self.holder)
        while not stop.wait(settings.LORASITE["DISPATCH_SECONDS"]):
            try:
                self.tick()
            except DatabaseError:
                logger.exception("dispatcher: the database does not answer, trying again")
                connection.close()
                self._leads = False
                stop.wait(1.0)
        self.step_down()
        logger.info("dispatcher stopped holder=%s", self.holder)

    def tick(self) -> None:
        """1. lead or stand by; 2. sweep what crashed; 3. ring for what waits."""
        now = time.monotonic()
        if now >= self._beat_due:
            self._leads = self._lead()
            self._beat_due = now + BEAT_SECONDS
        if not self._leads:
            return
        if now >= self._sweep_due:
            self._sweep()
            self._sweep_due = now + SWEEP_SECONDS
        self._doorbells.top_up(self._wanted())

    def step_down(self) -> None:
        """Give the lead to whoever stands by, at once."""
        try:
            LeaderLease.objects.filter(role=ROLE, holder=self.holder).update(lease_until=Now())
        except DatabaseError:
            logger.warning("dispatcher could not step down; the lead is free in %g s", LEADER_LEASE_SECONDS)
        self._leads = False

    @transaction.atomic
    def _lead(self) -> bool:
        LeaderLease.objects.get_or_create(
            role=ROLE, defaults={"holder": "", "lease_until": after(-1), "beat_at": Now()}
        )
        free_or_mine = Q(holder=self.holder) | Q(lease_until__lte=Now())
        led = LeaderLease.objects.filter(free_or_mine, role=ROLE).update(
            holder=self.holder, token=F("token") + 1, lease_until=after(LEADER_LEASE_SECONDS), beat_at=Now()
        )
        if bool(led) != self._leads:
            logger.info("dispatcher %s holder=%s", "leads" if led else "stands by", self.holder)
        return bool(led)

    def _sweep(self) -> None:
        lost = recovery.expired_leases_requeue()
        expired = recovery.queued_past_deadline_expire()
        gone = silent_workers_mark_gone()
        if lost or expired or gone:
            logger.info("sweep lost_leases=%d expired_jobs=%d silent_workers=%d", lost, expired, gone)

    def _wanted(self) -> dict[JobKind, int]:
        waiting = waiting_by_kind()
        if not waiting:
            return {}
        children = dict.fromkeys(QUEUES.values(), 0)
        for queues in live_workers().values_list("queues", flat=True):
            for queue in queues:
                if queue in children:
                    children[queue] += 1
        return {
            kind: min(waiting.get(kind, 0), DOORBELLS_PER_WORKER * children[queue]) for kind, queue in QUEUES.items()
        }
