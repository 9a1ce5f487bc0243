"""What the admin classes share: rows that nobody edits by hand, links between records, and small cells.

Used by the other files of this package only. Text from people always goes through format_html or a template.
"""

import json
from typing import Any

from django.contrib.admin.utils import quote
from django.db.models import Model
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline

from jobs.status import JobState

STATE_COLOURS = {
    JobState.QUEUED: "info",
    JobState.RUNNING: "primary",
    JobState.UPLOADING: "primary",
    JobState.SUCCEEDED: "success",
    JobState.FAILED: "danger",
    JobState.CANCELLED: "warning",
    JobState.EXPIRED: "warning",
}


class ReadOnlyAdmin(ModelAdmin):
    """Rows written by the product itself: staff look at them, and change them through actions only."""

    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Rows of this kind come from submissions and workers."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nothing is edited by hand."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """History stays."""
        return False


class ReadOnlyInline(TabularInline):
    """A table of rows that belong to the shown one."""

    extra = 0
    per_page = 20
    can_delete = False
    show_change_link = False
    hide_title = True

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Rows of this kind come from submissions and workers."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nothing is edited by hand."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """History stays."""
        return False


def duration(seconds: float) -> str:
    """A time span in the unit that suits it, as "83 s", "12 min" or "5 h"."""
    if seconds < 120:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    return f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min" if seconds < 7200 else f"{seconds / 3600:.0f}\N{NO-BREAK SPACE}h"


def admin_url(record: Model) -> str:
    """Address of a record's page in the admin."""
    meta = record._meta
    return reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(record.pk)])


def record_link(record: Model | None, text: str = "") -> str | SafeString:
    """A link to a record's page, or a dash."""
    if record is None:
        return "-"
    return format_html('<a class="lrs-link" href="{}">{}</a>', admin_url(record), text or str(record))


def state_label(state: str) -> SafeString:
    """A job state as a coloured label whose tooltip says what it means."""
    known = JobState(state)
    return render_to_string(
        "unfold/helpers/label.html", {"text": known.value, "type": STATE_COLOURS[known], "label_title": known.label}
    )


def pretty_json(value: Any) -> SafeString:
    """Any JSON value, indented."""
    return format_html(
        '<pre class="lrs-json">{}</pre>', json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)
    )


def megabytes(size_bytes: int) -> str:
    """A file size for people, e.g. '3.4 MB' or '812 kB'."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def leave_dialog(request: HttpRequest, url: str) -> HttpResponse:
    """Go on to a page after a dialog's form was sent; the dialog sends it with htmx, which needs its own header."""
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": url})
    return HttpResponseRedirect(url)
