"""One JSON shape for every error under /api/: {"code", "message", "fields"}. Tracebacks go to the log only.

`one_shape` serves DRF's views; the `django_*` functions are wired in `lorasite/urls.py` for what fails outside of them.
"""

import logging
from typing import Any

from django.core.exceptions import PermissionDenied, RequestDataTooBig, SuspiciousOperation
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.views import defaults
from pydantic import ValidationError as PydanticError
from rest_framework import exceptions
from rest_framework.response import Response
from rest_framework.views import set_rollback

from core.errors import CoreError
from jobs.errors import JobsError, TooBusy

logger = logging.getLogger(__name__)

API_PREFIX = "/api/"
MESSAGES = {
    400: ("bad_request", "this request cannot be read"),
    403: ("permission_denied", "this is not allowed"),
    404: ("not_found", "there is nothing at this address"),
    500: ("internal", "something went wrong on our side; it was logged, try again later"),
}


def error_body(code: str, message: str, fields: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """The shape of every error."""
    return {"code": code, "message": message, "fields": fields or {}}


def one_shape(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's EXCEPTION_HANDLER. None hands the error to Django, which logs it and calls `django_500`."""
    answer = _answer(error)
    if answer is None:
        return None
    status, body, headers = answer
    set_rollback()
    if status >= 500:
        logger.error("api error code=%s path=%s message=%s", body["code"], context["request"].path, body["message"])
    return Response(body, status=status, headers=headers)


def _answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]] | None:
    if isinstance(error, TooBusy):
        headers = {"Retry-After": str(error.retry_after_seconds)}
        return error.http_status, error_body(error.code, str(error)), headers
    if isinstance(error, JobsError):
        return error.http_status, error_body(error.code, str(error)), {}
    if isinstance(error, CoreError):
        return 400, error_body(error.code, str(error), config_fields(error)), {}
    if isinstance(error, RequestDataTooBig):
        return 413, error_body("too_large", "the request is larger than the server accepts: send less at once"), {}
    if isinstance(error, SuspiciousOperation):
        return 400, error_body("bad_request", str(error) or MESSAGES[400][1]), {}
    if isinstance(error, Http404):
        return 404, error_body(*MESSAGES[404]), {}
    if isinstance(error, PermissionDenied):
        return 403, error_body(*MESSAGES[403]), {}
    if isinstance(error, exceptions.ValidationError):
        fields = flat_fields(error.detail)
        return 400, error_body("invalid", _sentence(fields), fields), {}
    if isinstance(error, exceptions.APIException):
        return error.status_code, error_body(_code(error), str(error.detail)), _headers(error)
    return None


def config_fields(error: CoreError) -> dict[str, list[str]]:
    """{dotted field: problems} of a configuration error; empty for errors that concern no field."""
    cause = error.__cause__
    fields: dict[str, list[str]] = {}
    if isinstance(cause, PydanticError):
        for problem in cause.errors(include_url=False, include_context=False, include_input=False):
            fields.setdefault(".".join(map(str, problem["loc"])) or "body", []).append(problem["msg"])
    return fields


def flat_fields(detail: Any, prefix: str = "") -> dict[str, list[str]]:
    """DRF's nested error detail as {dotted field: problems}."""
    if isinstance(detail, dict):
        fields: dict[str, list[str]] = {}
        for name, value in detail.items():
            plain = "body" if name == "non_field_errors" else str(name)
            fields.update(flat_fields(value, f"{prefix}.{plain}" if prefix else plain))
        return fields
    if isinstance(detail, list) and any(isinstance(item, dict) for item in detail):
        return flat_fields({str(number): item for number, item in enumerate(detail) if item}, prefix)
    return {prefix or "body": [str(item) for item in (detail if isinstance(detail, list) else [detail])]}


def _sentence(fields: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {' '.join(problems)}" for name, problems in fields.items())


def _code(error: exceptions.APIException) -> str:
    codes = error.get_codes()
    return codes if isinstance(codes, str) else error.default_code


def _headers(error: exceptions.APIException) -> dict[str, str]:
    headers = {}
    challenge, wait_seconds = getattr(error, "auth_header", None), getattr(error, "wait", None)
    if challenge:
        headers["WWW-Authenticate"] = challenge
    if wait_seconds:
        headers["Retry-After"] = f"{wait_seconds:.0f}"
    return headers


def django_400(request: HttpRequest, exception: Exception) -> HttpResponse:
    """handler400: suspicious requests that no view saw."""
    return _plain(request, 400) or defaults.bad_request(request, exception)


def django_403(request: HttpRequest, exception: Exception) -> HttpResponse:
    """handler403."""
    return _plain(request, 403) or defaults.permission_denied(request, exception)


def django_404(request: HttpRequest, exception: Exception) -> HttpResponse:
    """handler404: addresses without a view."""
    return _plain(request, 404) or defaults.page_not_found(request, exception)


def django_500(request: HttpRequest) -> HttpResponse:
    """handler500: surprises of any view; Django has logged the traceback."""
    return _plain(request, 500) or defaults.server_error(request)


def _plain(request: HttpRequest, status: int) -> JsonResponse | None:
    if not request.path.startswith(API_PREFIX):
        return None
    return JsonResponse(error_body(*MESSAGES[status]), status=status)
