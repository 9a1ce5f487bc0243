"""Styles: named prompt templates of a person."""

from typing import Any
from uuid import UUID

from drf_spectacular.utils import extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from core.errors import ConfigError
from core.prompt_syntax import parse_prompt
from jobs import library, queries
from jobs.api.request_body import LabelField, StrictSerializer, read_input
from jobs.api.studio_view import StudioView
from jobs.models import Style

MAX_CHARACTERS = 4000


class StyleSerializer(serializers.ModelSerializer[Style]):
    """OutputSerializer of a style."""

    class Meta:
        model = Style
        fields = ["id", "name", "prompt", "negative_prompt", "created_at"]


@extend_schema_serializer(component_name="StyleInput")
class StyleInputSerializer(StrictSerializer):
    """A name and what it stands for."""

    name = LabelField()
    prompt = serializers.CharField(
        default="",
        allow_blank=True,
        max_length=MAX_CHARACTERS,
        help_text="Where it holds {prompt}, the words of a request go there; otherwise it is put behind them.",
    )
    negative_prompt = serializers.CharField(default="", allow_blank=True, max_length=MAX_CHARACTERS)

    def validate_prompt(self, text: str) -> str:
        """The grammar is checked here, where its author can mend it."""
        return _readable(text)

    def validate_negative_prompt(self, text: str) -> str:
        """As for the prompt."""
        return _readable(text)


def _readable(text: str) -> str:
    try:
        parse_prompt(text)
    except ConfigError as error:
        raise serializers.ValidationError(str(error)) from error
    return text


class StyleListView(StudioView):
    """Your styles."""

    queryset = Style.objects.none()
    filter_backends = []

    @extend_schema(operation_id="styles_list", responses=StyleSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your styles by name."""
        return self.page(queries.styles_of(self.person()), StyleSerializer)

    @extend_schema(request=StyleInputSerializer, responses={201: StyleSerializer})
    def post(self, request: Request) -> Response:
        """Make a style. 409 when you have one of that name."""
        values: dict[str, Any] = read_input(request, StyleInputSerializer)
        style = library.style_save(style=Style(owner=self.person()), values=values)
        return Response(StyleSerializer(style).data, status=201)


class StyleView(StudioView):
    """One style."""

    @extend_schema(responses=StyleSerializer)
    def get(self, request: Request, style_id: UUID) -> Response:
        """One style."""
        return Response(StyleSerializer(queries.one(queries.styles_of(self.person()), style_id)).data)

    @extend_schema(request=StyleInputSerializer, responses=StyleSerializer)
    def patch(self, request: Request, style_id: UUID) -> Response:
        """Change a style; requests made before keep their words."""
        style = queries.one(queries.styles_of(self.person()), style_id)
        style = library.style_save(style=style, values=read_input(request, StyleInputSerializer, partial=True))
        return Response(StyleSerializer(style).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, style_id: UUID) -> Response:
        """Remove a style."""
        library.style_delete(style=queries.one(queries.styles_of(self.person()), style_id))
        return Response(status=204)
