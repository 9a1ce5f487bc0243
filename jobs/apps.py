"""App config of the records."""

from django.apps import AppConfig


class JobsConfig(AppConfig):
    """The records, their rules, and the ways in (API, admin, tasks)."""

    name = "jobs"
    verbose_name = "LoRA studio"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from jobs import checks  # noqa: F401 - registers the system checks
