"""What the OpenAPI document says beyond the views themselves: the error shape, the key scheme, pydantic bodies."""

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema
from rest_framework import serializers

from jobs.models.accounts import KEY_PREFIX


class ErrorSerializer(serializers.Serializer[Any]):
    """The one shape of every error."""

    code = serializers.CharField(help_text="A short, stable word, e.g. `not_ready`.")
    message = serializers.CharField(help_text="A sentence for a person: what was wrong and what to do.")
    fields = serializers.DictField(  # type: ignore[assignment]
        child=serializers.ListField(child=serializers.CharField()),
        help_text="Problems by field, dotted (`config.steps`); empty unless the input was invalid.",
    )


ALWAYS = {"401": "No key or session, or one that is no longer valid.", "500": "Our fault; it was logged."}
WITH_ID = {"404": "No such row, or it belongs to somebody else."}
WITH_BODY = {
    "400": "Invalid input; `fields` says what.",
    "409": "Not ready, or in a state that forbids it.",
    "413": "Larger than accepted.",
    "415": "Another content type than the documented one.",
}
FOR_JOBS = {
    "422": "The Idempotency-Key was used for another request.",
    "429": "Too much work waits, yours (`too_many_jobs`, `too_much_work`) or everybody's (`queue_full`): "
    "try again after `Retry-After` seconds.",
}
RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which a place has probably come free.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 3600},
    }
}


class StudioSchema(AutoSchema):
    """AutoSchema that names every operation in a few words and documents its errors."""

    def get_summary(self) -> str | None:
        """The first sentence of the operation's description, so that the list of operations can be read."""
        return (self.get_description() or "").split(". ")[0].split("\n")[0].rstrip(".") or None

    def get_operation(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """As the parent's, plus the error answers that this operation can give."""
        operation = super().get_operation(*args, **kwargs)
        if operation is not None:
            error = self.resolve_serializer(ErrorSerializer(), "response")
            for status, description in self._errors(operation).items():
                content = {"application/json": {"schema": error.ref}}
                answer = {"description": description, "content": content}
                if status == "429":
                    answer["headers"] = RETRY_AFTER
                operation["responses"].setdefault(status, answer)
        return operation

    def _errors(self, operation: dict[str, Any]) -> dict[str, str]:
        errors = dict(ALWAYS)
        if "{" in self.path or self.method == "POST":
            errors |= WITH_ID
        if self.method in ("POST", "PATCH", "DELETE"):
            errors |= {"403": "A session without a CSRF token, or a public row of somebody else."}
            errors |= WITH_BODY if self.method != "DELETE" else {"409": WITH_BODY["409"]}
        if self._is_list_view():
            errors |= {"400": "A filter value that does not exist.", "404": "The cursor is damaged."}
        if "202" in operation["responses"]:
            errors |= FOR_JOBS
        return dict(sorted(errors.items()))


class ApiKeyScheme(OpenApiAuthenticationExtension):
    """Bearer keys."""

    target_class = "jobs.api.authentication.ApiKeyAuthentication"
    name = "apiKey"

    def get_security_definition(self, auto_schema: AutoSchema) -> dict[str, Any]:
        """An HTTP bearer scheme."""
        return {"type": "http", "scheme": "bearer", "bearerFormat": f"{KEY_PREFIX}..."}
