"""`manage.py studio`: a whole site on this machine, with one command."""

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from lorasite.environment import Environment
from lorasite.studio.errors import StudioError
from lorasite.studio.run import run_studio


class Command(BaseCommand):
    """Front of `lorasite.studio`."""

    help = (
        "Start everything on this machine: broker, web server, dispatcher, a gpu worker and a cpu worker. Prints one "
        "URL and one login when it is ready. Ctrl-C stops everything; running trainings save a checkpoint and go on at "
        "the next start. All data is kept in one folder."
    )
    requires_system_checks = []  # the children check; this process touches no database

    def add_arguments(self, parser: CommandParser) -> None:
        """Where, on which port, with or without the demo."""
        parser.add_argument("--data", type=Path, help="data folder (default: LORASITE_DATA, or var/ beside manage.py)")
        parser.add_argument(
            "--port", type=int, default=8000, help="port of the web server on 127.0.0.1 (default: 8000)"
        )
        parser.add_argument("--no-demo", action="store_true", help="do not register the demo base model")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run until stopped."""
        try:
            data = options["data"] or Environment().data
            run_studio(data=data, port=options["port"], with_demo=not options["no_demo"])
        except StudioError as error:
            raise CommandError(str(error)) from error
