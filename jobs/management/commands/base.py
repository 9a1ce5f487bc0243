"""`manage.py base add SRC [--name NAME] [--warm] [--wait]`, `list`, `warm`, `unwarm`: base models."""

import time
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from jobs.errors import JobsError
from jobs.models import BaseModel, User
from jobs.status import ACTIVE
from jobs.submission import base_preparation_submit

POLL_SECONDS = 0.5


class Command(BaseCommand):
    """Base models from the command line; the admin offers the same."""

    help = (
        "Register a base model and submit its preparation, or list the registered ones. SRC is the folder of a "
        "diffusers SD 1.x or SDXL pipeline (the one that holds model_index.json) as the workers see it, or a hub id "
        "(owner/model). A gpu worker prepares it once; people can use it when `base list` says ready. Adding SRC "
        "under the same name again changes nothing, unless its preparation had failed: then it is submitted again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """One subcommand each."""
        commands = parser.add_subparsers(dest="command", required=True, metavar="add|list|warm|unwarm")
        add = commands.add_parser("add", help="register a base model and submit its preparation")
        add.add_argument("source", metavar="SRC", help="folder of a diffusers pipeline, or a hub id")
        add.add_argument(
            "--name", help="short name that requests and LoRA files use, e.g. sd15 (default: the last part of SRC)"
        )
        add.add_argument("--warm", action="store_true", help="workers load it at start and keep it")
        add.add_argument("--user", help="account that the preparation runs for (default: the first superuser)")
        add.add_argument("--wait", action="store_true", help="come back when it is ready; needs a running gpu worker")
        for command, explained in (
            ("warm", "workers load it at their next start and keep it"),
            ("unwarm", "workers load it when somebody asks for it, and give it back when idle"),
        ):
            commands.add_parser(command, help=explained).add_argument("name", metavar="NAME")
        commands.add_parser("list", help="show the registered base models and whether they are ready")

    def handle(self, *args: Any, **options: Any) -> None:
        """Dispatch to the subcommand."""
        command = options["command"]
        if command == "add":
            name = options["name"] or Path(options["source"]).name
            self._add(options["source"], name, warm=options["warm"], username=options["user"])
            if options["wait"]:
                self._wait(name)
        elif command == "list":
            self._list()
        else:
            BaseModel.objects.filter(pk=_named(options["name"]).pk).update(keep_warm=command == "warm")
            self.stdout.write(
                f"{options['name']}: {'warm' if command == 'warm' else 'on demand'} from the next start on"
            )

    def _add(self, source: str, name: str, *, warm: bool, username: str | None) -> None:
        if not 1 <= len(name) <= 100:
            raise CommandError("--name must have 1 to 100 characters")
        if Path(source).is_dir():
            source = str(Path(source).resolve())  # workers may run in another folder
        owner = _owner(username)
        with transaction.atomic():
            base, created = BaseModel.objects.get_or_create(name=name, defaults={"source": source, "keep_warm": warm})
            if base.source != source:
                raise CommandError(
                    f"base model {name!r} is registered with source {base.source}: choose another --name"
                )
            if warm and not base.keep_warm:
                BaseModel.objects.filter(pk=base.pk).update(keep_warm=True)
            if base.fingerprint or (base.job is not None and base.job.state in ACTIVE):
                self.stdout.write(f"{name}: registered already ({_state(base)})")
                return
            try:
                job = base_preparation_submit(owner=owner, base_model=base)
            except JobsError as error:
                raise CommandError(f"{name}: {error}") from error
        self.stdout.write(f"{name}: {'registered' if created else 'submitted again'}, preparation is job {job.pk}")

    def _wait(self, name: str) -> None:
        while not (base := _named(name)).fingerprint:
            if base.job is None or base.job.state not in ACTIVE:
                raise CommandError(f"{name}: {_state(base)}")
            time.sleep(POLL_SECONDS)
        self.stdout.write(f"{name}: {_state(base)}")

    def _list(self) -> None:
        bases = list(BaseModel.objects.select_related("job"))
        if not bases:
            self.stdout.write("no base models yet: add one with `manage.py base add SRC --name NAME`")
        for base in bases:
            warm = "warm" if base.keep_warm else "on demand"
            self.stdout.write(f"{base.name:20} {_state(base):40} {warm:10} {base.source}")


def _named(name: str) -> BaseModel:
    base = BaseModel.objects.select_related("job").filter(name=name).first()
    if base is None:
        raise CommandError(f"there is no base model {name!r}: `manage.py base list` shows all")
    return base


def _owner(username: str | None) -> User:
    if username is not None:
        owner = User.objects.filter(username=username, is_active=True).first()
        if owner is None:
            raise CommandError(f"there is no active user {username!r}")
        return owner
    owner = User.objects.filter(is_superuser=True, is_active=True).order_by("date_joined").first()
    if owner is None:
        raise CommandError("there is no superuser yet: make one with `manage.py createsuperuser`, or name a --user")
    return owner


def _state(base: BaseModel) -> str:
    """Ready, or how far its preparation is."""
    if base.fingerprint:
        return f"ready {base.fingerprint[:12]}"
    if base.job is None:
        return "not prepared"
    error = f": {base.job.error_message}" if base.job.error_message else ""
    return f"preparation {base.job.state}{error}"
