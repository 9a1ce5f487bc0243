"""The dispatcher: watches the database, rings doorbells, repairs what crashes left behind. Of several, one leads.

Front: `manage.py dispatch`.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from django.conf import settings
from django.db import DatabaseError, IntegrityError, connection
from django.db.models import F, Q
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs import recovery
from jobs.database_clock import after
from jobs.doorbells import Doorbells, doorbells_wanted
from jobs.garbage import SWEEP_EVERY_SECONDS, garbage_sweep
from jobs.life_locks import dead_workers_close
from jobs.models import LeaderLease
from jobs.preemption import trainings_ask_to_yield
from jobs.queue import waiting_by_kind
from jobs.status import QUEUES
from jobs.wakeup import Wakeup, wakeup
from jobs.workers import live_workers, silent_workers_mark_gone

logger = logging.getLogger(__name__)

ROLE = "dispatcher"
LEADER_LEASE_SECONDS = 4.0
BEAT_SECONDS = 1.0
SWEEP_SECONDS = 1.0
CHILDREN_SECONDS = 1.0
"""How long the list of live workers is believed; a new one waits this long for its first doorbell."""
SAFETY_SECONDS = 0.5
"""A leader stops acting this long before its lease can have run out by the database's clock."""


LEADER_STALE_SECONDS = 15.0
"""Unheard for so long, with nobody in its place: `/readyz` and the overview say that jobs wait."""


class Leader(NamedTuple):
    """Who leads the dispatchers, by the database's clock."""

    holder: str
    age_seconds: float
    """Since it was last heard."""


def leader() -> Leader | None:
    """The dispatcher that led last; None when none ever ran."""
    row = LeaderLease.objects.filter(role=ROLE).annotate(now=Now()).values_list("holder", "now", "beat_at").first()
    return None if row is None else Leader(row[0], (row[1] - row[2]).total_seconds())


class Dispatcher:
    """One dispatcher process."""

    def __init__(self, doorbells: Doorbells | None = None) -> None:
        # A restarted container may get the same host name and process number.
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self._doorbells = doorbells or Doorbells()
        self._leads = False
        self._lead_ends = self._beat_due = self._sweep_due = self._count_due = self._children_due = 0.0
        self._garbage_due = time.monotonic() + SWEEP_EVERY_SECONDS / 10
        self._garbage: threading.Thread | None = None
        self._children: dict[str, int] = {}
        self._waiting: dict[str, int] = {}

    def run(self, stop: threading.Event) -> None:
        """Tick until told to stop. A database that does not answer is waited for."""
        logger.info("dispatcher started holder=%s", self.holder)
        bell: Wakeup = wakeup()
        announced: Counter[str] = Counter()
        while not stop.is_set():
            try:
                self.tick(announced)
                announced = bell.wait(stop, settings.LORASITE["DISPATCH_SECONDS"])
            except DatabaseError:
                logger.exception("dispatcher: the database does not answer, trying again")
                connection.close()
                self._leads = False
                self._beat_due = 0.0
                stop.wait(1.0)
        bell.close()
        self.step_down()
        self._doorbells.close()
        logger.info("dispatcher stopped holder=%s", self.holder)

    def tick(self, announced: Mapping[str, int] | None = None) -> None:
        """1. lead or stand by; 2. ring for what was announced or waits; 3. sweep what crashed.

        Args:
            announced: {kind: jobs} that became claimable just now; without any, or where a kind is empty, the
                waiting jobs are counted.
        """
        now = time.monotonic()
        if now >= min(self._beat_due, self._lead_ends):
            self._beat(now)
            self._beat_due = now + BEAT_SECONDS
        if not self._may_act():
            return
        if now >= self._children_due:
            self._children, self._children_due = _children_by_queue(), now + CHILDREN_SECONDS
        if announced and "" not in announced and now < self._count_due:
            # Without asking the database: that would double the time from the commit to the doorbell.
            wanted = doorbells_wanted(Counter(self._waiting) + Counter(announced), self._children)
            self._doorbells.top_up({kind: count for kind, count in wanted.items() if kind in announced})
        else:
            self._waiting = waiting_by_kind()
            self._doorbells.top_up(doorbells_wanted(self._waiting, self._children))
            self._count_due = time.monotonic() + settings.LORASITE["DISPATCH_SECONDS"]
        if now >= self._sweep_due and self._may_act():
            self._sweep()
            self._sweep_due = time.monotonic() + SWEEP_SECONDS
        if now >= self._garbage_due and self._may_act():
            self._garbage_due = now + SWEEP_EVERY_SECONDS
            self._collect_garbage()

    def step_down(self) -> None:
        """Give the lead to whoever stands by, at once."""
        try:
            with side_effect("dispatcher.step_down"):
                LeaderLease.objects.filter(role=ROLE, holder=self.holder).update(lease_until=Now())
        except DatabaseError:
            logger.warning("dispatcher could not step down; the lead is free in %g s", LEADER_LEASE_SECONDS)
        self._leads = False

    def _may_act(self) -> bool:
        """A leader that was paused for longer than its lease must ask again before it acts."""
        return self._leads and time.monotonic() < self._lead_ends

    def _beat(self, asked_at: float) -> None:
        free_or_mine = Q(holder=self.holder) | Q(lease_until__lte=Now())
        row = LeaderLease.objects.filter(role=ROLE)
        with side_effect("dispatcher.lead"):
            led = bool(
                row.filter(free_or_mine).update(
                    holder=self.holder, token=F("token") + 1, lease_until=after(LEADER_LEASE_SECONDS), beat_at=Now()
                )
            )
        if not led and not row.exists():
            led = self._first_lead()
        # Counted from before the question, which is the safe side.
        self._lead_ends = asked_at + LEADER_LEASE_SECONDS - SAFETY_SECONDS
        if led != self._leads:
            logger.info("dispatcher %s holder=%s", "leads" if led else "stands by", self.holder)
        self._leads = led

    def _first_lead(self) -> bool:
        try:
            with side_effect("dispatcher.first_lead"):
                LeaderLease.objects.create(
                    role=ROLE, holder=self.holder, token=1, lease_until=after(LEADER_LEASE_SECONDS), beat_at=Now()
                )
        except IntegrityError:
            return False  # Another one was faster.
        return True

    def _sweep(self) -> None:
        sweeps: dict[str, Callable[[], int]] = {
            "jobs_of_dead_workers": dead_workers_close,
            "lost_leases": recovery.expired_leases_requeue,
            "expired_jobs": recovery.queued_past_deadline_expire,
            "cancelled_jobs": recovery.waiting_cancel,
            "silent_workers": silent_workers_mark_gone,
            "trainings_asked": trainings_ask_to_yield,
        }
        for name, sweep in sweeps.items():
            try:
                count = sweep()
            except DatabaseError:
                raise
            except Exception:
                # One broken rule must not keep the others from their work, nor the doorbells.
                logger.exception("sweep failed name=%s", name)
                continue
            if count:
                logger.info("sweep %s=%d", name, count)

    def _collect_garbage(self) -> None:
        """In a thread with a connection of its own: a slow store must not delay a doorbell."""
        if self._garbage is not None and self._garbage.is_alive():
            return
        self._garbage = threading.Thread(target=_sweep_garbage, name="garbage", daemon=True)
        self._garbage.start()


def _sweep_garbage() -> None:
    try:
        garbage_sweep()
    except Exception:
        logger.exception("garbage sweep failed; the next one is in %g s", SWEEP_EVERY_SECONDS)
    finally:
        connection.close()


def _children_by_queue() -> dict[str, int]:
    children = dict.fromkeys(QUEUES.values(), 0)
    for queues in live_workers().values_list("queues", flat=True):
        for queue in queues:
            if queue in children:
                children[queue] += 1
    return children
