"""The admin in a real browser: login, lists, pages and a dialog work without internet, without a failed request."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, sync_playwright

from jobs.models import Job
from jobs.status import JobState
from tests.jobs.admin.conftest import Site, site

__all__ = ["site"]

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    # The browser driver runs an event loop in this thread, which Django takes for an asynchronous caller.
    monkeypatch.setitem(os.environ, "DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield started
        started.close()


class Visit:
    """A page that remembers what went wrong."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.problems: list[str] = []
        page.on("request", self._on_request)
        page.on("response", self._on_response)
        page.on("requestfailed", lambda request: self._on_failure(request))
        page.on("pageerror", lambda error: self.problems.append(f"script error: {error}"))
        page.on("console", self._on_console)

    def go(self, path: str) -> None:
        self.page.goto(self.address + path, wait_until="networkidle")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:")):
            self.problems.append(f"external request: {request.url}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def _on_failure(self, request: Request) -> None:
        self.problems.append(f"failed request: {request.url} {request.failure}")

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")


@pytest.fixture
def visit(browser: Browser, live_server: object) -> Visit:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    return Visit(page, live_server.url)  # type: ignore[attr-defined]


@pytest.mark.django_db(transaction=True)
def test_an_operator_logs_in_looks_around_and_cancels_a_job(visit: Visit, site: Site, tmp_path: Path) -> None:
    shots = Path(os.environ.get("LORASITE_SCREENSHOTS") or tmp_path)
    page = visit.page
    visit.go("/admin/jobs/job/")
    page.fill("input[name=username]", "operator")
    page.fill("input[name=password]", "operator-password")
    page.screenshot(path=shots / "login.png")
    page.click("button[type=submit]")
    page.wait_for_url("**/admin/jobs/job/")
    page.wait_for_load_state("networkidle")
    assert page.locator("#result_list tbody tr").count() == Job.objects.count()
    assert "37 %" in page.inner_text("#result_list")
    page.screenshot(path=shots / "jobs.png")

    training = site.training
    for path, name in (
        ("/admin/", "home"),
        (f"/admin/jobs/job/{training.job_id}/change/", "job"),
        (f"/admin/jobs/job/{Job.objects.get(state=JobState.FAILED).pk}/change/", "failed-job"),
        (f"/admin/jobs/trainingrun/{training.pk}/change/", "training"),
        ("/admin/jobs/trainingrun/", "trainings"),
        (f"/admin/jobs/dataset/{site.dataset.pk}/change/", "dataset"),
        ("/admin/jobs/datasetimage/", "dataset-pictures"),
        ("/admin/jobs/generatedimage/", "generated-pictures"),
        (f"/admin/jobs/generationrequest/{site.request.pk}/change/", "generation"),
        ("/admin/jobs/workerprocess/", "workers"),
        ("/admin/jobs/basemodel/", "bases"),
        (f"/admin/jobs/basemodel/{site.base.pk}/change/", "base"),
        ("/admin/jobs/lora/", "loras"),
        ("/admin/jobs/apikey/add/", "new-key"),
    ):
        visit.go(path)
        page.screenshot(path=shots / f"{name}.png", full_page=True)
    assert visit.problems == []

    visit.go(f"/admin/jobs/job/{training.job_id}/change/")
    page.get_by_role("link", name="Cancel").first.click()
    page.get_by_role("button", name="Stop it").wait_for()
    page.screenshot(path=shots / "cancel.png")
    page.get_by_role("button", name="Stop it").click()
    page.get_by_text("asked to stop at its next step").first.wait_for()
    page.screenshot(path=shots / "cancelled.png")
    training.job.refresh_from_db()
    assert training.job.cancel_requested_at is not None
    assert visit.problems == []
    assert (shots / "jobs.png").stat().st_size > 10_000
