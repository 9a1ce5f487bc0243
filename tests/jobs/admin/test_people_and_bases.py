"""API keys are shown once; registering a base submits its preparation."""

from django.test import Client
from django.urls import reverse

from jobs.models import ApiKey, BaseModel, Job, User
from jobs.status import JobKind, JobState
from tests.jobs.admin.conftest import Site


def test_a_new_api_key_is_shown_exactly_once(site: Site, operator_client: Client) -> None:
    form = {"user": str(site.creator.pk), "name": "frontend", "expires_at_0": "2099-01-01", "expires_at_1": "00:00"}
    response = operator_client.post(reverse("admin:jobs_apikey_add"), form, follow=True)
    text = response.content.decode()
    secret = "lrs_" + text.split(": lrs_")[1][:43]
    key = ApiKey.objects.get(name="frontend")
    assert key.secret_sha256 == ApiKey.hash_secret(secret)
    assert key.expires_at is not None
    assert ApiKey.objects.usable().filter(pk=key.pk).exists()
    for url in (reverse("admin:jobs_apikey_changelist"), reverse("admin:jobs_apikey_change", args=[key.pk])):
        assert secret not in operator_client.get(url).content.decode()


def test_changing_a_keys_name_keeps_the_key(site: Site, operator_client: Client) -> None:
    key = ApiKey.objects.get(name="laptop")
    url = reverse("admin:jobs_apikey_change", args=[key.pk])
    form = {"name": "old laptop", "user": str(site.operator.pk), "expires_at_0": "", "expires_at_1": ""}
    assert operator_client.post(url, form).status_code == 302
    changed = ApiKey.objects.get(pk=key.pk)
    assert (changed.name, changed.secret_sha256, changed.user) == ("old laptop", key.secret_sha256, site.creator)


def test_revoked_keys_are_no_longer_usable(operator_client: Client) -> None:
    key = ApiKey.objects.get(name="laptop")
    form = {"action": "revoke", "_selected_action": [str(key.pk)]}
    response = operator_client.post(reverse("admin:jobs_apikey_changelist"), form, follow=True)
    assert not ApiKey.objects.usable().filter(pk=key.pk).exists()
    assert b"revoked" in response.content


def test_registering_a_base_submits_its_preparation(site: Site, operator_client: Client) -> None:
    form = {"name": "sd15", "source": "/models/sd15", "keep_warm": "on"}
    response = operator_client.post(reverse("admin:jobs_basemodel_add"), form, follow=True)
    base = BaseModel.objects.get(name="sd15")
    assert base.keep_warm
    assert base.job is not None
    assert (base.job.kind, base.job.state, base.job.owner) == (JobKind.PREPARE_BASE, JobState.QUEUED, site.operator)
    assert str(base.job.pk) in response.content.decode()


def test_a_base_that_is_being_prepared_is_not_submitted_twice(site: Site, operator_client: Client) -> None:
    form = {"action": "prepare_again", "_selected_action": [str(site.base.pk)]}
    url = reverse("admin:jobs_basemodel_changelist")
    operator_client.post(url, form)
    response = operator_client.post(url, form, follow=True)
    assert b"being prepared already" in response.content
    assert Job.objects.filter(kind=JobKind.PREPARE_BASE, state=JobState.QUEUED).count() == 1


def test_the_source_of_a_registered_base_stays(site: Site, operator_client: Client) -> None:
    url = reverse("admin:jobs_basemodel_change", args=[site.base.pk])
    operator_client.post(url, {"name": "other", "source": "/elsewhere", "keep_warm": ""})
    base = BaseModel.objects.get(pk=site.base.pk)
    assert (base.name, base.source, base.keep_warm) == ("demo", "demo/tiny-sd-emoji", False)


def test_an_account_can_be_added_and_given_a_password(operator_client: Client) -> None:
    form = {
        "username": "newcomer",
        "password1": "a-long-Pass-9",
        "password2": "a-long-Pass-9",
        "usable_password": "true",
    }
    operator_client.post(reverse("admin:jobs_user_add"), form)
    assert User.objects.get(username="newcomer").check_password("a-long-Pass-9")


def test_a_persons_weight_is_set_on_their_page_and_their_usage_is_shown(site: Site, operator_client: Client) -> None:
    url = reverse("admin:jobs_user_change", args=[site.creator.pk])
    text = operator_client.get(url).content.decode().replace("\N{NO-BREAK SPACE}", " ")
    assert "Share of the workers" in text and "9 min" in text
    form = {
        "username": "creator",
        "is_active": "on",
        "scheduling_weight": "2.5",
        "date_joined_0": "2026-01-01",
        "date_joined_1": "00:00",
    }
    assert operator_client.post(url, form).status_code == 302
    assert User.objects.get(pk=site.creator.pk).scheduling_weight == 2.5
    assert operator_client.post(url, {**form, "scheduling_weight": "0"}).status_code == 200, "refused"
    assert User.objects.get(pk=site.creator.pk).scheduling_weight == 2.5


def test_the_first_page_says_what_waits_who_waits_and_who_leads(site: Site, operator_client: Client) -> None:
    text = operator_client.get(reverse("admin:index")).content.decode().replace("\N{NO-BREAK SPACE}", " ")
    for shown in ("Waiting by kind of work", "1 held by workers", "Who waits", "weight 1", "Who leads", "node-1:99"):
        assert shown in text, shown
