"""All addresses of the site. Routes only."""

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from lorasite.health import healthz, readyz

urlpatterns = [
    path("", RedirectView.as_view(url="/admin/"), name="home"),
    path("admin/", admin.site.urls),
    path("api/", include("jobs.api.urls")),
    path("healthz", healthz, name="healthz"),
    path("readyz", readyz, name="readyz"),
]

# One JSON shape for every error under /api/, Django's pages elsewhere.
handler400 = "jobs.api.exception_handler.django_400"
handler403 = "jobs.api.exception_handler.django_403"
handler404 = "jobs.api.exception_handler.django_404"
handler500 = "jobs.api.exception_handler.django_500"
