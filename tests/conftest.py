"""People and their API clients, and a view of the artifact store. For every test that touches the records.

Also says in which order files are tested. `make test` tests two side by side, and those marked `alone` after them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from rest_framework.test import APIClient

from jobs.models import ApiKey, User

MakeClient = Callable[[User], APIClient]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a long one at the end would run by itself, with nothing beside it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def owner(db: None) -> User:
    """Whose rows a test is about."""
    return User.objects.create_user("owner", password="correct horse battery")


@pytest.fixture
def teammate(db: None) -> User:
    """Somebody with rows of their own, who may see what the owner made public."""
    return User.objects.create_user("teammate")


@pytest.fixture
def stranger(db: None) -> User:
    """Somebody who owns nothing."""
    return User.objects.create_user("stranger")


@pytest.fixture
def client_of() -> MakeClient:
    """An API client that sends a fresh key of this person; answers 500 instead of raising, as a server does."""

    def make(user: User) -> APIClient:
        _, secret = ApiKey.issue(user=user, name="test")
        client = APIClient(raise_request_exception=False)
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {secret}")
        return client

    return make


@pytest.fixture
def api(owner: User, client_of: MakeClient) -> APIClient:
    """The owner's client."""
    return client_of(owner)


@pytest.fixture
def anonymous(db: None) -> APIClient:
    """A client without key or session."""
    return APIClient(raise_request_exception=False)


@pytest.fixture
def blobs(db: None) -> Callable[[], set[str]]:
    """Names of everything in the local artifact store, half-written files included."""

    def names() -> set[str]:
        root = Path(default_storage.path(""))
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

    return names
