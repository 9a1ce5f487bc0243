"""`manage.py base add SRC --name NAME [--warm]` and `manage.py base list`: register base models and prepare them."""

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from jobs.errors import JobsError
from jobs.models import BaseModel, User
from jobs.status import ACTIVE
from jobs.submission import base_preparation_submit


class Command(BaseCommand):
    """Base models from the command line; the admin offers the same."""

    help = (
        "Register a base model and submit its preparation, or list the registered ones. SRC is the folder of a "
        "diffusers SD 1.x pipeline (the one that holds model_index.json) as the workers see it, or a Hugging Face hub "
        "id. A gpu worker prepares it once; people can use it when `base list` says ready. Adding the same SRC "
        "under the same name again changes nothing, unless its preparation had failed: then it is submitted again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Two subcommands."""
        commands = parser.add_subparsers(dest="command", required=True, metavar="add|list")
        add = commands.add_parser("add", help="register a base model and submit its preparation")
        add.add_argument("source", metavar="SRC", help="folder of a diffusers SD 1.x pipeline, or a hub id")
        add.add_argument("--name", required=True, help="short name that requests and LoRA files use, e.g. sd15")
        add.add_argument("--warm", action="store_true", help="workers load it at start and keep it")
        add.add_argument("--user", help="account that the preparation runs for (default: the first superuser)")
        commands.add_parser("list", help="show the registered base models and whether they are ready")

    def handle(self, *args: Any, **options: Any) -> None:
        """Dispatch to the subcommand."""
        if options["command"] == "add":
            self._add(options["source"], options["name"], warm=options["warm"], username=options["user"])
        else:
            self._list()

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

    def _list(self) -> None:
        bases = list(BaseModel.objects.select_related("job"))
        if not bases:
            self.stdout.write("no base models yet: add one with `manage.py base add SRC --name NAME`")
        for base in bases:
            warm = "warm" if base.keep_warm else "on demand"
            self.stdout.write(f"{base.name:20} {_state(base):40} {warm:10} {base.source}")


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
