"""Stored blobs in the admin: what the store should hold, and when somebody last wanted it."""

from django.contrib import admin

from jobs.admin.readonly import ReadOnlyAdmin
from jobs.models import Artifact


@admin.register(Artifact)
class ArtifactAdmin(ReadOnlyAdmin):
    """One row per blob. What nothing refers to is removed by the dispatcher after a while."""

    list_display = ["sha256", "size_bytes", "created_at", "put_at"]
    search_fields = ["sha256"]
    ordering = ["-put_at"]
    show_full_result_count = False
