"""The look at a job while it runs."""

from uuid import UUID

from django.http import HttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework.request import Request

from jobs.api.studio_view import StudioView
from jobs.previews import preview_of

JPEG = "image/jpeg"


class JobPreviewView(StudioView):
    """The newest preview of a running generation."""

    @extend_schema(
        operation_id="jobs_preview",
        responses={(200, JPEG): OpenApiResponse(OpenApiTypes.BINARY, description="Its first picture as it is now.")},
    )
    def get(self, request: Request, job_id: UUID) -> HttpResponse:
        """A small JPEG, at most 16 KiB; `X-Step` says after how many steps. 404 while there is none."""
        preview = preview_of(self.person(), job_id)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Step": str(preview.step)}
        return HttpResponse(bytes(preview.jpeg), content_type=JPEG, headers=headers)
