"""`manage.py base`: registers base models and shows them."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from jobs.errors import JobsError
from jobs.models import BaseModel, User
from jobs.status import ACTIVE
from jobs.submission import base_preparation_submit


class Command(BaseCommand):
    """Front of `jobs.submission.base_preparation_submit`."""

    help = (
        "Register base models. `base add SRC --name NAME` records a diffusers folder (or hub id) and submits its "
        "preparation, which a gpu worker runs; `base list` shows all. Adding the same base again is harmless."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Options."""
        actions = parser.add_subparsers(dest="action", required=True)
        add = actions.add_parser("add", help="register a base model and submit its preparation")
        add.add_argument("source", help="folder on the worker nodes, or a hub id")
        add.add_argument("--name", required=True, help="short name used in requests, e.g. sd15")
        add.add_argument("--warm", action="store_true", help="workers load it at start and keep it")
        add.add_argument("--user", help="owner of the preparation job; default: the first superuser")
        actions.add_parser("list", help="show all base models")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run one of the two actions."""
        if options["action"] == "list":
            for base in BaseModel.objects.select_related("job"):
                state = "ready" if base.fingerprint else (base.job.state if base.job else "not prepared")
                self.stdout.write(f"{base.name:20} {state:12} {'warm' if base.keep_warm else '':5} {base.source}")
            return
        self._add(**{name: options[name] for name in ("source", "name", "warm", "user")})

    def _add(self, *, source: str, name: str, warm: bool, user: str | None) -> None:
        people = User.objects.filter(username=user) if user else User.objects.filter(is_superuser=True)
        owner = people.order_by("date_joined").first()
        if owner is None:
            raise CommandError(
                f"no user {user!r}" if user else "no superuser yet: run `manage.py createsuperuser` first"
            )
        base, created = BaseModel.objects.get_or_create(name=name, defaults={"source": source, "keep_warm": warm})
        if base.source != source:
            raise CommandError(f"base model {name!r} exists with source {base.source!r}: choose another name")
        if warm and not base.keep_warm:
            BaseModel.objects.filter(pk=base.pk).update(keep_warm=True)
        if not created and (base.fingerprint or (base.job and base.job.state in ACTIVE)):
            self.stdout.write(f"base model {name} is there already")
            return
        try:
            job = base_preparation_submit(owner=owner, base_model=base)
        except JobsError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"base model {name} registered, preparation submitted as job {job.pk}")
