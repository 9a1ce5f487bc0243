"""How views read what a client sends: strictly. An unknown field is refused by name, never ignored."""

from typing import Annotated, Any, TypeVar

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.core.validators import RegexValidator
from drf_spectacular.utils import OpenApiParameter
from pydantic import StringConstraints
from rest_framework import serializers
from rest_framework.exceptions import ParseError
from rest_framework.request import Request

from core.config import Config
from core.errors import ConfigError
from jobs.errors import InvalidInput

LABEL_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]*$"
"""Names are shown and become parts of download names: no control characters."""

Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100, pattern=LABEL_PATTERN)]

MAX_KEY_CHARACTERS = 200
IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    description="At most 200 printable ASCII characters. The same key with the same body answers with the job made "
    "first; with another body: 422.",
)

ConfigType = TypeVar("ConfigType", bound=Config)


class StrictSerializer(serializers.Serializer[Any]):
    """An input that names every field it does not know."""

    def to_internal_value(self, data: Any) -> Any:
        """As the parent's, after unknown fields were refused."""
        if isinstance(data, dict):
            unknown = sorted(set(map(str, data)) - set(self.fields))
            if unknown:
                known = ", ".join(self.fields)
                raise serializers.ValidationError({name: [f"unknown field; known are: {known}"] for name in unknown})
        return super().to_internal_value(data)


class LabelField(serializers.CharField):
    """A name that people gave: 1-100 characters, none of them a control character."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            max_length=100,
            validators=[RegexValidator(LABEL_PATTERN, "contains control characters; remove them")],
            **kwargs,
        )


def read_json(request: Request) -> Any:
    """The JSON body; {} where there is none.

    Raises:
        RequestDataTooBig: Larger than DATA_UPLOAD_MAX_MEMORY_SIZE, which DRF's parser itself would not look at.
        ParseError: Not JSON, or nested deeper than the parser goes.
    """
    if int(request.META.get("CONTENT_LENGTH") or 0) > settings.DATA_UPLOAD_MAX_MEMORY_SIZE:
        raise RequestDataTooBig("body too large")
    try:
        return request.data
    except RecursionError as error:
        raise ParseError("the JSON is nested too deeply") from error


def read_input(request: Request, serializer: type[StrictSerializer], *, partial: bool = False) -> dict[str, Any]:
    """The validated JSON body. Raises DRF's ValidationError with one entry per wrong field."""
    checked = serializer(data=read_json(request), partial=partial)
    checked.is_valid(raise_exception=True)
    return dict(checked.validated_data)


def read_config(request: Request, config: type[ConfigType]) -> ConfigType:
    """The JSON body as a configuration class of `core.config` or one built on it.

    Raises:
        ConfigError: Names every wrong and every unknown field.
    """
    body = read_json(request)
    if not isinstance(body, dict):
        raise ConfigError(f"the body must be a JSON object, not {type(body).__name__}")
    return config.parse(body)


def read_idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key header, None where there is none.

    Raises:
        InvalidInput: Empty, too long, or not printable ASCII.
    """
    key: str | None = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not key or len(key) > MAX_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
        raise InvalidInput(
            f"Idempotency-Key has {len(key)} characters: send 1 to {MAX_KEY_CHARACTERS} printable ASCII ones"
        )
    return key
