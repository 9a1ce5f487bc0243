"""`manage.py garbage [--remove]`: which stored blobs nothing needs, and a sweep by hand."""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from jobs.garbage import garbage_sweep_whole, old_artifacts, unreferenced_artifacts
from jobs.models import Artifact

SHOWN = 20


class Command(BaseCommand):
    """Front of `jobs/garbage.py`."""

    help = (
        "Show which stored blobs no record names: pictures and LoRAs that were deleted, checkpoints of ended jobs, "
        "what a crash left behind. The dispatcher removes them by itself, a little every few minutes, once nobody "
        "stored or needed them for LORASITE_GARBAGE_AFTER_SECONDS (a day, unless you set it). This command changes "
        "nothing unless you add --remove, which runs the same rules over the whole store now; it may run while the "
        "site works."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Look, or remove."""
        parser.add_argument("--remove", action="store_true", help="run a whole sweep now instead of only looking")

    def handle(self, *args: Any, **options: Any) -> None:
        """Figures first, names after."""
        if options["remove"]:
            done = garbage_sweep_whole()
            self.stdout.write(
                f"removed {done.removed} blobs; {done.adopted} unknown ones found, which are kept for "
                f"{settings.LORASITE['GARBAGE_AFTER_SECONDS']:g} s; {done.leftovers} half-written files cleared"
            )
            return
        rows, known = unreferenced_artifacts(), Artifact.objects.count()
        old = set(old_artifacts(known, set()))
        due = [row for row in rows if row.pk in old]
        self.stdout.write(
            f"{known} blobs known, {len(rows)} named by no record "
            f"({sum(row.size_bytes for row in rows)} bytes), {len(due)} of them old enough to be removed"
        )
        for row in rows[:SHOWN]:
            state = "old" if row.pk in old else "kept for now"
            self.stdout.write(
                f"{row.pk}  {row.size_bytes:>12} bytes  last used {row.put_at:%Y-%m-%d %H:%M} UTC  {state}"
            )
        if len(rows) > SHOWN:
            self.stdout.write(f"... and {len(rows) - SHOWN} more")
