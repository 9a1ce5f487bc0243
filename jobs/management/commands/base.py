"""`manage.py base add SRC [--name NAME] [--vae SRC] [--warm] [--wait]`, `prepare`, `list`, `warm`, `unwarm`."""

import time
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from jobs.errors import JobsError
from jobs.models import BaseModel, User
from jobs.status import ACTIVE, JobState
from jobs.submission import base_preparation_submit

POLL_SECONDS = 0.5


class Command(BaseCommand):
    """Base models from the command line; the admin offers the same."""

    help = (
        "Register a base model and submit its preparation, or list the registered ones. SRC is the folder of a "
        "diffusers SD 1.x or SDXL pipeline (the one that holds model_index.json) as the workers see it, or a hub id "
        "(owner/model or owner/model@revision). A gpu worker prepares it once; people can use it when `base list` says "
        "ready. Adding SRC under the same name again changes nothing, unless its preparation had failed: then it is "
        "submitted again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """One subcommand each."""
        commands = parser.add_subparsers(dest="command", required=True, metavar="add|prepare|list|warm|unwarm")
        add = commands.add_parser("add", help="register a base model and submit its preparation")
        add.add_argument("source", metavar="SRC", help="folder of a diffusers pipeline, or a hub id")
        add.add_argument(
            "--name", help="short name that requests and LoRA files use, e.g. sd15 (default: the last part of SRC)"
        )
        add.add_argument(
            "--vae", default="", metavar="SRC", help="folder or hub id whose VAE takes the place of the base's own"
        )
        add.add_argument("--warm", action="store_true", help="workers load it at start and keep it")
        prepare = commands.add_parser(
            "prepare", help="prepare a registered base again, e.g. after libraries were updated or its source changed"
        )
        prepare.add_argument("name", metavar="NAME")
        for parser_of_preparation in (add, prepare):
            parser_of_preparation.add_argument(
                "--user", help="account that the preparation runs for (default: the first superuser)"
            )
            parser_of_preparation.add_argument(
                "--wait", action="store_true", help="come back when it is ready; needs a running gpu worker"
            )
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
            self._add(options["source"], name, vae=options["vae"], warm=options["warm"], username=options["user"])
            if options["wait"]:
                self._wait(name)
        elif command == "prepare":
            base = _named(options["name"])
            self._submit(base, owner=_owner(options["user"]), says="submitted again")
            if options["wait"]:
                self._wait(base.name, anew=True)
        elif command == "list":
            self._list()
        else:
            BaseModel.objects.filter(pk=_named(options["name"]).pk).update(keep_warm=command == "warm")
            self.stdout.write(
                f"{options['name']}: {'warm' if command == 'warm' else 'on demand'} from the next start on"
            )

    def _add(self, source: str, name: str, *, vae: str, warm: bool, username: str | None) -> None:
        if not 1 <= len(name) <= 100:
            raise CommandError("--name must have 1 to 100 characters")
        source, vae = _absolute(source), _absolute(vae)
        owner = _owner(username)
        with transaction.atomic():
            base, created = BaseModel.objects.get_or_create(
                name=name, defaults={"source": source, "vae_source": vae, "keep_warm": warm}
            )
            if base.source != source:
                raise CommandError(
                    f"base model {name!r} is registered with source {base.source}: choose another --name"
                )
            if base.vae_source != vae:
                raise CommandError(
                    f"base model {name!r} is registered with {base.vae_source or 'its own VAE'}: choose another --name"
                )
            if warm and not base.keep_warm:
                BaseModel.objects.filter(pk=base.pk).update(keep_warm=True)
            if base.fingerprint or (base.job is not None and base.job.state in ACTIVE):
                self.stdout.write(f"{name}: registered already ({_state(base)})")
                return
            self._submit(base, owner=owner, says="registered" if created else "submitted again")

    def _submit(self, base: BaseModel, *, owner: User, says: str) -> None:
        try:
            job = base_preparation_submit(owner=owner, base_model=base)
        except JobsError as error:
            raise CommandError(f"{base.name}: {error}") from error
        self.stdout.write(f"{base.name}: {says}, preparation is job {job.pk}")

    def _wait(self, name: str, *, anew: bool = False) -> None:
        """Until it is ready, or with `anew` until its newest preparation has ended, too."""
        while (base := _named(name)).job is not None and base.job.state in ACTIVE and (anew or not base.fingerprint):
            time.sleep(POLL_SECONDS)
        if not base.fingerprint or (anew and base.job is not None and base.job.state != JobState.SUCCEEDED):
            raise CommandError(f"{name}: {_state(base)}")
        self.stdout.write(f"{name}: {_state(base)}")

    def _list(self) -> None:
        bases = list(BaseModel.objects.select_related("job"))
        if not bases:
            self.stdout.write("no base models yet: add one with `manage.py base add SRC --name NAME`")
        for base in bases:
            warm = "warm" if base.keep_warm else "on demand"
            self.stdout.write(f"{base.name:20} {_state(base):40} {warm:10} {base.source}")


def _absolute(source: str) -> str:
    """Of a folder its full path: workers may run in another one."""
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


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
    ready = f"ready {base.fingerprint[:12]}" if base.fingerprint else ""
    if base.job is None or (ready and base.job.state == JobState.SUCCEEDED):
        return ready or "not prepared"
    error = f": {base.job.error_message}" if base.job.error_message else ""
    return f"{ready}{', ' if ready else ''}preparation {base.job.state}{error}"
