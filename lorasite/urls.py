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
