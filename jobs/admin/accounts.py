"""People, groups and API keys in the admin."""

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group
from django.db.models import QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from jobs.admin.readonly import ReadOnlyAdmin, duration
from jobs.models import ApiKey, OwnerUsage, User
from jobs.usage import decayed

admin.site.unregister(Group)


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    """Groups carry permissions, e.g. "may look, may not cancel"."""


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ModelAdmin):
    """People with an account. Deactivate instead of deleting: a person's rows go with the account."""

    list_display = [
        "username",
        "email",
        "is_active",
        "is_staff",
        "is_superuser",
        "scheduling_weight",
        "used_lately",
        "last_login",
    ]
    list_filter = ["is_active", "is_staff", "is_superuser", "groups"]
    search_fields = ["username", "email"]
    readonly_fields = ["last_login", "date_joined", "used_lately"]
    list_select_related = ["usage"]
    fieldsets = (
        *(DjangoUserAdmin.fieldsets or ()),
        ("Share of the workers", {"fields": ["scheduling_weight", "used_lately"]}),
    )
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm

    @display(description="Used lately", ordering="usage__worker_seconds")
    def used_lately(self, person: User) -> str:
        """Worker time as it counts for fair turns now: the older, the less."""
        usage = getattr(person, "usage", None)
        return "-" if usage is None else duration(decayed(usage.worker_seconds, usage.as_of, timezone.now()))


@admin.register(OwnerUsage)
class OwnerUsageAdmin(ReadOnlyAdmin):
    """What people used of the workers lately; their turns follow from it."""

    list_display = ["owner", "worker_seconds", "as_of"]
    search_fields = ["owner__username"]
    list_select_related = ["owner"]
    ordering = ["-worker_seconds"]


@admin.register(ApiKey)
class ApiKeyAdmin(ModelAdmin):
    """Keys for the REST API. A new key is shown once, in the message after saving."""

    list_display = ["name", "prefix", "user", "key_state", "created_at", "expires_at", "last_used_at"]
    list_filter = ["created_at", "revoked_at"]
    search_fields = ["name", "prefix", "user__username"]
    readonly_fields = ["prefix", "created_at", "revoked_at", "last_used_at"]
    autocomplete_fields = ["user"]
    list_select_related = ["user"]
    actions = ["revoke"]

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[str]:
        """A new key needs a person and a purpose; the rest is made."""
        chosen = ["user", "name", "expires_at"]
        return chosen if obj is None else chosen + list(self.readonly_fields)

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[str]:
        """A key never changes hands."""
        return list(self.readonly_fields) if obj is None else ["user", *self.readonly_fields]

    @display(
        description="State",
        label={"usable": "success", "revoked": "danger", "expired": "warning", "person inactive": "warning"},
    )
    def key_state(self, key: ApiKey) -> str:
        """Whether a request with this key gets in now."""
        if key.revoked_at is not None:
            return "revoked"
        if key.expires_at is not None and key.expires_at <= timezone.now():
            return "expired"
        return "usable" if key.user.is_active else "person inactive"

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        """Adding issues the key and shows it once; changing touches name and date only."""
        if change:
            super().save_model(request, obj, form, change)
            return
        key, secret = ApiKey.issue(user=obj.user, name=obj.name)
        ApiKey.objects.filter(pk=key.pk).update(expires_at=obj.expires_at)
        obj.pk, obj.prefix, obj.secret_sha256, obj.created_at = key.pk, key.prefix, key.secret_sha256, key.created_at
        messages.warning(request, f"Copy this key now, it is not shown again: {secret}")

    @action(description="Revoke selected keys", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Requests with these keys are refused from now on."""
        revoked = queryset.filter(revoked_at__isnull=True).update(revoked_at=Now())
        messages.success(request, f"{revoked} keys revoked.")
