"""Pictures inside the admin: verified bytes from the artifact store, for staff who may see the row that they belong to.

The content type is fixed, so that stored bytes can never be shown as a page.
"""

import logging
from io import BytesIO
from typing import Any
from uuid import UUID

from django.db.models import Model
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from PIL import Image, UnidentifiedImageError
from unfold.admin import ModelAdmin
from unfold.decorators import display

from jobs.artifacts import artifact_open
from jobs.errors import ArtifactDamaged

logger = logging.getLogger(__name__)

THUMBNAIL_PX = 192
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_AGE_SECONDS = 7 * 24 * 3600  # bytes behind a hash never change


def picture_response(sha256: str, *, reduced: bool) -> HttpResponse:
    """A stored picture: its own bytes, or as a PNG shrunk to `THUMBNAIL_PX` for tables.

    Raises:
        Http404: The bytes are missing or damaged.
    """
    try:
        with artifact_open(sha256) as stream:
            content = _reduced_png(stream.read()) if reduced else stream.read()
            content_type = "image/png" if reduced else _content_type(content)
    except (ArtifactDamaged, UnidentifiedImageError) as error:
        logger.exception("picture not shown sha256=%s", sha256)
        raise Http404(f"picture {sha256} cannot be shown: {error}") from error
    return HttpResponse(
        content,
        content_type=content_type,
        headers={
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cache-Control": f"private, max-age={MAX_AGE_SECONDS}, immutable",
        },
    )


def _content_type(content: bytes) -> str:
    """Of a stored picture, by its content: one of three that no browser takes for a page."""
    with Image.open(BytesIO(content), formats=FORMATS) as picture:
        return f"image/{str(picture.format).lower()}"


def _reduced_png(content: bytes) -> bytes:
    with Image.open(BytesIO(content), formats=FORMATS) as picture:
        if max(picture.size) <= THUMBNAIL_PX and picture.format == "PNG":
            return content
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        out = BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()


def thumbnail(thumbnail_url: str, picture_url: str, title: str) -> SafeString:
    """A small picture that links to the whole one."""
    return format_html(
        '<a href="{}" target="_blank" rel="noopener">'
        '<img class="lrs-thumbnail" src="{}" alt="{}" title="{}" loading="lazy"></a>',
        picture_url,
        thumbnail_url,
        title,
        title,
    )


class PictureAdminMixin(ModelAdmin):
    """For records with a `sha256` of a stored picture: a `thumbnail` column and the views behind it."""

    def get_urls(self) -> list[URLPattern]:
        """Adds `<id>/picture/` and `<id>/thumbnail/`."""
        name = f"{self.opts.app_label}_{self.opts.model_name}"
        return [
            path(
                f"<uuid:pk>/{size}/",
                self.admin_site.admin_view(self.picture_view),
                {"reduced": size == "thumbnail"},
                name=f"{name}_{size}",
            )
            for size in ("picture", "thumbnail")
        ] + super().get_urls()

    def picture_view(self, request: HttpRequest, pk: UUID, reduced: bool) -> HttpResponse:
        """The picture of one row, for staff who may see that row."""
        record = self.get_queryset(request).filter(pk=pk).first()
        if record is None or not self.has_view_permission(request, record):
            raise Http404(f"no {self.opts.verbose_name} {pk}")
        return picture_response(record.sha256, reduced=reduced)

    @display(description="Picture")
    def thumbnail(self, record: Any) -> SafeString:
        """The picture, small."""
        return record_thumbnail(record)


def record_thumbnail(record: Model) -> SafeString:
    """The small picture of a record whose admin is a `PictureAdminMixin`."""
    name = f"admin:{record._meta.app_label}_{record._meta.model_name}"
    return thumbnail(
        reverse(f"{name}_thumbnail", args=[record.pk]), reverse(f"{name}_picture", args=[record.pk]), str(record)
    )
