"""The base of all API views: the signed-in person, one page of a list, the answer of a started job."""

from typing import Any, cast

from django.db.models import QuerySet
from rest_framework.exceptions import ParseError
from rest_framework.generics import GenericAPIView
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer
from rest_framework.utils.mediatypes import media_type_matches

from jobs.api.schema import StudioSchema
from jobs.models import User


class FixedContentType(BaseContentNegotiation):
    """Every address answers in its one documented type, whatever `Accept` says."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        """The parser of the request's content type, None where there is none (415)."""
        return next((parser for parser in parsers if media_type_matches(parser.media_type, request.content_type)), None)

    def select_renderer(
        self, request: Request, renderers: Any, format_suffix: str | None = None
    ) -> tuple[BaseRenderer, str]:
        """The view's first renderer."""
        return renderers[0], renderers[0].media_type


class StudioView(GenericAPIView):  # type: ignore[type-arg]
    """Routes live in `urls.py`, rules in `submission`, `library` and `queries`; a view validates, calls, serializes.

    `queryset` is an empty one that only tells the schema which model is meant; rows come from `jobs.queries`.
    """

    schema = StudioSchema()
    metadata_class = None
    content_negotiation_class = FixedContentType

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """As the parent's; a body of unknown length, which the parsers would take for an empty one, is refused."""
        super().initial(request, *args, **kwargs)
        if request.headers.get("Transfer-Encoding") and not request.headers.get("Content-Length"):
            raise ParseError("send the body with a Content-Length instead of in chunks")

    def person(self) -> User:
        """Who asks."""
        return cast(User, self.request.user)

    def page(self, rows: "QuerySet[Any]", serializer: type["BaseSerializer[Any]"]) -> Response:
        """One page of rows, filtered by the declared filters."""
        page = self.paginate_queryset(self.filter_queryset(rows))
        return self.get_paginated_response(serializer(page, many=True).data)

    def permit(self, request: Request, row: Any) -> None:
        """Raise PermissionDenied where this person may see the row but not change it."""
        self.check_object_permissions(request, row)
