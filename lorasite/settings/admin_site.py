"""How the admin looks: title, colours, sidebar. Read by `settings/base.py`; everything is served by the site itself."""

from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse_lazy


def _page(title: str, icon: str, model: str) -> dict[str, Any]:
    """A sidebar entry to a model's list, shown to those who may see it. `model` is 'app.model' in lower case."""
    app, name = model.split(".")

    def allowed(request: HttpRequest) -> bool:
        return request.user.has_perm(f"{app}.view_{name}")

    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{app}_{name}_changelist"),
        "permission": allowed,
    }


def _favicon(request: HttpRequest) -> str:
    return static("jobs/favicon.svg")


def _stylesheet(request: HttpRequest) -> str:
    return static("jobs/admin.css")


UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "lorasite",
    "SITE_HEADER": "lorasite",
    "SITE_SUBHEADER": "LoRA studio",
    "SITE_SYMBOL": "auto_awesome_mosaic",
    "SITE_URL": None,
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_BACK_BUTTON": True,
    "DASHBOARD_CALLBACK": "jobs.admin.home.home_context",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": _favicon}],
    "STYLES": [_stylesheet],
    "SIDEBAR": {
        "show_search": True,
        "show_all_applications": False,
        "navigation": [
            {
                "title": "Work",
                "items": [
                    {"title": "Overview", "icon": "home", "link": reverse_lazy("admin:index")},
                    _page("Jobs", "pending_actions", "jobs.job"),
                    _page("Trainings", "model_training", "jobs.trainingrun"),
                    _page("Generations", "draw", "jobs.generationrequest"),
                    _page("Attempts", "replay", "jobs.jobattempt"),
                    _page("Events", "history", "jobs.jobevent"),
                    _page("Previews", "visibility", "jobs.jobpreview"),
                ],
            },
            {
                "title": "Results",
                "separator": True,
                "items": [
                    _page("Datasets", "photo_library", "jobs.dataset"),
                    _page("Dataset pictures", "image", "jobs.datasetimage"),
                    _page("Dataset versions", "inventory_2", "jobs.datasetversion"),
                    _page("LoRAs", "tune", "jobs.lora"),
                    _page("LoRA versions", "layers", "jobs.loraversion"),
                    _page("LoRA imports", "upload_file", "jobs.loraimport"),
                    _page("LoRA uses", "link", "jobs.generationlora"),
                    _page("Generated pictures", "collections", "jobs.generatedimage"),
                    _page("Pictures to begin from", "add_photo_alternate", "jobs.inputimage"),
                    _page("Styles", "palette", "jobs.style"),
                ],
            },
            {
                "title": "People",
                "separator": True,
                "items": [
                    _page("Accounts", "person", "jobs.user"),
                    _page("Groups", "group", "auth.group"),
                    _page("API keys", "key", "jobs.apikey"),
                ],
            },
            {
                "title": "Machines",
                "separator": True,
                "items": [
                    _page("Base models", "deployed_code", "jobs.basemodel"),
                    _page("Workers", "memory", "jobs.workerprocess"),
                    _page("Dispatcher", "campaign", "jobs.leaderlease"),
                ],
            },
        ],
    },
}
