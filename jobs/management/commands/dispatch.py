"""`manage.py dispatch`: rings workers and repairs what crashes left behind. Run one or more; one leads."""

import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand

from jobs.dispatch import Dispatcher


class Command(BaseCommand):
    """Front of `jobs.dispatch.Dispatcher`."""

    help = (
        "Watch the database for jobs and ring the workers through the broker (LORASITE_BROKER_URL). "
        "Also takes back jobs of dead workers. Start it once per site; a second one stands by and takes over "
        "within 5 seconds."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        """Run until SIGTERM or Ctrl-C."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        Dispatcher().run(stop)
