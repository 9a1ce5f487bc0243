"""Who may change a row that others can see. Everything else is settled by owner-scoped querysets."""

from typing import Any

from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request
from rest_framework.views import APIView


class OwnerChangesOthersRead(BasePermission):
    """Public LoRAs: everyone reads, only the owner changes."""

    message = "only its owner may change this"

    def has_object_permission(self, request: Request, view: APIView, obj: Any) -> bool:
        """Reading was allowed by the queryset already."""
        return request.method in SAFE_METHODS or obj.owner_id == request.user.pk
