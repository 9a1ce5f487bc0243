"""Bearer keys and sessions."""

from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone
from rest_framework.test import APIClient

from jobs.models import ApiKey, Dataset, User
from tests.factories import make_dataset, picture_file

URL = "/api/v1/datasets/"


@pytest.fixture
def secret(owner: User) -> str:
    return ApiKey.issue(user=owner, name="laptop")[1]


def ask(header: str) -> int:
    return int(APIClient().get(URL, headers={"Authorization": header}).status_code)


def test_a_key_opens_the_api_by_its_hash_alone(secret: str) -> None:
    assert ask(f"Bearer {secret}") == 200
    assert ask(f"bearer {secret}") == 200
    stored = ApiKey.objects.get()
    assert secret not in [str(value) for value in vars(stored).values()]
    assert ask(f"Bearer {stored.secret_sha256}") == 401


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer a b", "Bearer lrs_wrong", "Bearer x" + "y" * 500, "Basic abc", "é"]
)
def test_anything_else_is_401_with_the_scheme(header: str, secret: str) -> None:
    response = APIClient().get(URL, HTTP_AUTHORIZATION=header)
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == 'Bearer realm="lorasite"'


@pytest.mark.parametrize("change", ["revoked", "expired", "inactive"])
def test_a_key_that_ended_is_401(change: str, secret: str, owner: User) -> None:
    past = timezone.now() - timedelta(seconds=5)
    if change == "inactive":
        User.objects.filter(pk=owner.pk).update(is_active=False)
    else:
        ApiKey.objects.update(**{"revoked_at" if change == "revoked" else "expires_at": past})
    assert ask(f"Bearer {secret}") == 401


def test_a_key_with_a_future_date_works(secret: str) -> None:
    ApiKey.objects.update(expires_at=timezone.now() + timedelta(minutes=5))
    assert ask(f"Bearer {secret}") == 200


def test_the_last_use_is_noted_at_most_once_a_minute(secret: str) -> None:
    ask(f"Bearer {secret}")
    first = ApiKey.objects.get().last_used_at
    assert first is not None
    ask(f"Bearer {secret}")
    assert ApiKey.objects.get().last_used_at == first
    ApiKey.objects.update(last_used_at=first - timedelta(seconds=61))
    ask(f"Bearer {secret}")
    again = ApiKey.objects.get().last_used_at
    assert again is not None and again >= first


def test_a_session_reads_but_writes_only_with_a_csrf_token(owner: User) -> None:
    client = APIClient(enforce_csrf_checks=True)
    assert client.login(username="owner", password="correct horse battery")
    assert client.get(URL).status_code == 200
    refused = client.post(URL, {"name": "x"}, format="json")
    assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied")
    assert not Dataset.objects.exists()
    client.get("/admin/login/")
    client.cookies["csrftoken"] = "a" * 32
    assert client.post(URL, {"name": "x"}, format="json", headers={"X-CSRFToken": "a" * 32}).status_code == 201


def test_a_session_uploads_with_the_size_cap_in_place(owner: User) -> None:
    """The CSRF check reads the multipart body before the view does."""
    dataset = make_dataset(owner, pictures=0)
    client = APIClient(enforce_csrf_checks=True)
    client.login(username="owner", password="correct horse battery")
    client.cookies["csrftoken"] = "a" * 32
    url = f"{URL}{dataset.pk}/images/"
    assert client.post(url, {"files": [picture_file()]}, format="multipart").status_code == 403
    accepted = client.post(url, {"files": [picture_file()]}, format="multipart", headers={"X-CSRFToken": "a" * 32})
    assert accepted.status_code == 201


def test_the_command_prints_a_working_key_and_nothing_else(owner: User, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("api_key", "owner", name="laptop")
    secret = capsys.readouterr().out
    assert secret.startswith("lrs_") and secret.count("\n") == 1
    assert ask(f"Bearer {secret.strip()}") == 200
    assert ApiKey.objects.get().name == "laptop"


def test_the_command_names_a_person_it_does_not_know(db: None) -> None:
    with pytest.raises(CommandError, match="no active user 'nobody'"):
        call_command("api_key", "nobody", name="laptop")
