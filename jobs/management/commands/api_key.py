"""`manage.py api_key USERNAME --name laptop`: a new API key, printed once."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from jobs.models import ApiKey, User


class Command(BaseCommand):
    """Make an API key for a person."""

    help = "Make an API key for a person and print it. Only its hash is stored, so it cannot be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        """Whose key, and what it is for."""
        parser.add_argument("username")
        parser.add_argument("--name", required=True, help="What the key is for, e.g. laptop.")

    def handle(self, *args: Any, **options: Any) -> None:
        """The key is the only line on stdout, so that scripts can read it."""
        user = User.objects.filter(username=options["username"], is_active=True).first()
        if user is None:
            raise CommandError(
                f"there is no active user {options['username']!r}: make one with `manage.py createsuperuser`"
            )
        if not 1 <= len(options["name"]) <= 100:
            raise CommandError("--name must have 1 to 100 characters")
        _, secret = ApiKey.issue(user=user, name=options["name"])
        self.stdout.write(secret)
