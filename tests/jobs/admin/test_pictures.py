"""Pictures inside the admin: verified, PNG only, small where small is enough."""

from io import BytesIO

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.test import Client
from django.urls import reverse
from PIL import Image

from core.image_files import encode_picture
from jobs.artifacts import artifact_name, artifact_put_stream
from jobs.models import GeneratedImage
from tests.jobs.admin.conftest import Site


def test_a_picture_is_sent_as_png_and_may_not_run_anything(site: Site, operator_client: Client) -> None:
    response = operator_client.get(reverse("admin:jobs_generatedimage_picture", args=[site.image.pk]))
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert Image.open(BytesIO(response.content)).size == (512, 512)


def test_a_thumbnail_is_a_smaller_picture(site: Site, operator_client: Client) -> None:
    response = operator_client.get(reverse("admin:jobs_generatedimage_thumbnail", args=[site.image.pk]))
    assert Image.open(BytesIO(response.content)).size == (192, 192)


def test_damaged_bytes_are_not_shown(site: Site, operator_client: Client) -> None:
    name = artifact_name(site.picture.sha256)
    default_storage.delete(name)
    default_storage.save(name, ContentFile(b"<html><script>alert(1)</script>"))
    try:
        response = operator_client.get(reverse("admin:jobs_datasetimage_picture", args=[site.picture.pk]))
        assert response.status_code == 404
        assert b"alert(1)" not in response.content
    finally:
        default_storage.delete(name)


def test_people_who_are_not_staff_get_no_picture(site: Site, client: Client) -> None:
    client.force_login(site.creator)
    url = reverse("admin:jobs_datasetimage_picture", args=[site.picture.pk])
    assert client.get(url).status_code == 302


def test_samples_of_a_training_are_shown_by_step_and_prompt(site: Site, operator_client: Client) -> None:
    page = operator_client.get(reverse("admin:jobs_trainingrun_change", args=[site.training.pk])).content.decode()
    assert "<polyline" in page
    for sample in site.training.samples:
        url = reverse("admin:jobs_trainingrun_sample_thumbnail", args=[site.training.pk, sample["sha256"]])
        assert url in page
        assert operator_client.get(url).headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("other", ["0" * 64, "..", "not-a-hash"])
def test_a_training_hands_out_its_own_samples_only(other: str, site: Site, operator_client: Client) -> None:
    own = reverse("admin:jobs_trainingrun_sample_picture", args=[site.training.pk, "SHA"])
    assert operator_client.get(own.replace("SHA", other)).status_code in (302, 404)
    foreign = own.replace("SHA", site.picture.sha256)
    assert operator_client.get(foreign).status_code == 404


@pytest.mark.parametrize("losses", [[], [0.5], [0.5] * 3, [0.1 * i for i in range(5000)]])
def test_a_loss_curve_of_any_length_is_drawn_or_says_why_not(losses: list[float]) -> None:
    from jobs.admin.loss_curve import MAX_POINTS, loss_curve

    drawn = str(loss_curve(losses))
    if len(losses) < 2:
        assert drawn == "no losses yet"
    else:
        points = drawn.split('points="')[1].split('"')[0].split()
        assert 2 <= len(points) <= MAX_POINTS
        assert "nan" not in drawn


def test_pictures_of_other_formats_are_shown_as_what_they_are(site: Site, operator_client: Client) -> None:
    sha256, _ = artifact_put_stream(BytesIO(encode_picture(Image.new("RGB", (400, 300)), "x", image_format="webp")))
    GeneratedImage.objects.filter(pk=site.image.pk).update(sha256=sha256, image_format="webp")

    whole, small = (
        operator_client.get(reverse(f"admin:jobs_generatedimage_{size}", args=[site.image.pk]))
        for size in ("picture", "thumbnail")
    )

    assert (whole.headers["Content-Type"], small.headers["Content-Type"]) == ("image/webp", "image/png")
    assert Image.open(BytesIO(small.content)).size == (192, 144)


def test_a_running_jobs_page_shows_its_preview_to_staff_alone(site: Site, operator_client: Client) -> None:
    job, url = site.training.job, reverse("admin:jobs_jobpreview_picture", args=[site.training.job.pk])

    assert url in operator_client.get(reverse("admin:jobs_job_change", args=[job.pk])).content.decode()
    shown = operator_client.get(url)
    assert (shown.content, shown.headers["Content-Type"]) == (b"a look", "image/jpeg")
    operator_client.force_login(site.creator)
    assert operator_client.get(url).status_code == 302
