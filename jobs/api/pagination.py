"""Cursor pagination of all lists: stable while rows are added, and no count over the whole table."""

from django.utils.dateparse import parse_datetime
from rest_framework.exceptions import NotFound
from rest_framework.pagination import Cursor, CursorPagination
from rest_framework.request import Request


class CreatedAtCursorPagination(CursorPagination):
    """Newest first; `page_size` may be asked for, up to 200."""

    ordering: tuple[str, ...] = ("-created_at", "-id")
    page_size_query_param = "page_size"
    max_page_size = 200

    def decode_cursor(self, request: Request) -> Cursor | None:
        """As the parent's, and a cursor that was tampered with is refused instead of reaching the database."""
        cursor = super().decode_cursor(request)
        if cursor is not None and cursor.position is not None and not self.position_is_valid(str(cursor.position)):
            raise NotFound(self.invalid_cursor_message)
        return cursor

    def position_is_valid(self, position: str) -> bool:
        """Whether a cursor's position is a value of the column that orders the list."""
        try:
            return parse_datetime(position) is not None
        except ValueError:
            return False


class OldestFirstPagination(CreatedAtCursorPagination):
    """In the order of creation: pictures of a dataset."""

    ordering = ("created_at", "id")


class EventPagination(CreatedAtCursorPagination):
    """Events of a job by their growing id."""

    ordering = ("id",)

    def position_is_valid(self, position: str) -> bool:
        """Ids are digits, and fit the column."""
        return position.isascii() and position.isdigit() and int(position) < 2**63
