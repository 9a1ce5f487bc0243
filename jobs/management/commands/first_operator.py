"""`manage.py first_operator`: the first superuser of a new site, made once. Called by `manage.py studio`."""

import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from jobs.models import User

PASSWORD_VARIABLE = "DJANGO_SUPERUSER_PASSWORD"  # noqa: S105 - the name of a variable
MADE, KEPT, CHANGED = "made", "kept", "kept, with another password"


class Command(BaseCommand):
    """Unlike `createsuperuser`, running it again is harmless, and it tells whether the known password still fits."""

    help = f"Make a superuser with the password in {PASSWORD_VARIABLE}, unless that account exists."

    def add_arguments(self, parser: CommandParser) -> None:
        """Which account."""
        parser.add_argument("--username", default="admin")

    def handle(self, *args: Any, **options: Any) -> None:
        """One line on stdout: made, kept, or kept with another password."""
        password = os.environ.get(PASSWORD_VARIABLE, "")
        if not password:
            raise CommandError(f"{PASSWORD_VARIABLE} is empty: set it to the password of the first operator")
        user = User.objects.filter(username=options["username"]).first()
        if user is None:
            User.objects.create_superuser(options["username"], "", password)
            self.stdout.write(MADE)
        else:
            self.stdout.write(KEPT if user.check_password(password) else CHANGED)
