"""Every registered record has a list and a page that render with rows, for staff only."""

import pytest
from django.contrib import admin
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from jobs.models import Dataset, DatasetImage, DatasetVersion, GeneratedImage, GenerationRequest, Job, User
from jobs.status import JobKind, JobState
from tests.jobs.admin.conftest import Site, make_job, stored_picture

REGISTERED = sorted(admin.site._registry, key=lambda model: model._meta.label)
names = [model._meta.label for model in REGISTERED]


def test_every_record_of_the_product_is_registered() -> None:
    from django.apps import apps

    missing = {model._meta.label for model in apps.get_app_config("jobs").get_models()} - set(names)
    assert missing == set()


@pytest.mark.parametrize("model", REGISTERED, ids=names)
def test_a_list_shows_its_rows(model: type, operator_client: Client) -> None:
    if model._meta.label == "auth.Group":
        model.objects.create(name="curators")
    response = operator_client.get(reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist"))
    assert response.status_code == 200
    assert response.context["cl"].result_count == model.objects.count() > 0
    assert b"<script>alert(1)" not in response.content


@pytest.mark.parametrize("model", REGISTERED, ids=names)
def test_every_row_has_a_page(model: type, operator_client: Client) -> None:
    if model._meta.label == "auth.Group":
        model.objects.create(name="curators")
    for row in model.objects.all():
        url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_change", args=[row.pk])
        response = operator_client.get(url)
        assert response.status_code == 200, url
        assert b"<script>alert(1)" not in response.content


@pytest.mark.parametrize("model", REGISTERED, ids=names)
def test_a_person_who_is_not_staff_is_sent_to_the_login(model: type, site: Site, client: Client) -> None:
    client.force_login(site.creator)
    response = client.get(reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist"))
    assert response.status_code == 302
    assert response.headers["Location"].startswith("/admin/login/")


def test_staff_without_permissions_see_no_rows(site: Site, client: Client) -> None:
    client.force_login(User.objects.create_user("temp", password="temp-password", is_staff=True))
    assert client.get(reverse("admin:jobs_job_changelist")).status_code == 403
    assert client.get(reverse("admin:jobs_datasetimage_picture", args=[site.picture.pk])).status_code == 404


@pytest.mark.parametrize(
    "model", [Job, DatasetImage, DatasetVersion, GenerationRequest, GeneratedImage], ids=lambda model: model.__name__
)
def test_a_longer_list_costs_no_more_queries(model: type, site: Site, operator_client: Client) -> None:
    url = reverse(f"admin:jobs_{model._meta.model_name}_changelist")
    operator_client.get(url)

    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            assert operator_client.get(url).status_code == 200
        return len(captured)

    before = queries()
    other = Dataset.objects.create(owner=site.creator, name="more")
    for number in range(4):
        sha256, size = stored_picture(f"#0000{number:02d}")
        picture = {"owner": site.creator, "sha256": sha256, "size_bytes": size, "width": 64, "height": 64}
        DatasetImage.objects.create(dataset=other, name="x", **picture)
        prepare = make_job(site.creator, JobKind.PREPROCESS, JobState.SUCCEEDED, {})
        DatasetVersion.objects.create(owner=site.creator, dataset=other, number=number, job=prepare)
        generate = make_job(site.creator, JobKind.GENERATE, JobState.SUCCEEDED, {"prompt": "x"})
        request = GenerationRequest.objects.create(owner=site.creator, job=generate, base_model=site.base)
        GeneratedImage.objects.create(request=request, number=0, seed=1, **picture)
    assert queries() == before


def test_heavy_columns_stay_in_the_database_while_jobs_are_listed(operator_client: Client) -> None:
    with CaptureQueriesContext(connection) as captured:
        operator_client.get(reverse("admin:jobs_job_changelist"))
    assert not [query["sql"] for query in captured if '"error_traceback"' in query["sql"]]
    assert not [query["sql"] for query in captured if '"jobs_job"."spec"' in query["sql"]]


def test_the_first_page_says_what_is_wrong_and_what_failed_last(operator_client: Client) -> None:
    text = operator_client.get("/admin/").content.decode()
    assert "No worker is ready to prepare datasets. Start `celery -A lorasite worker -Q cpu`" in text
    assert "ready to train" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert(1)" not in text


def test_the_first_page_shows_no_figures_to_staff_who_may_not_see_jobs(site: Site, client: Client) -> None:
    client.force_login(User.objects.create_user("temp", password="temp-password", is_staff=True))
    response = client.get("/admin/")
    assert response.status_code == 200
    assert b"Failed last" not in response.content
