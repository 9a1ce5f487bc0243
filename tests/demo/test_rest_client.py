"""The demo's REST client against a small server of its own."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demo.rest_client import ApiError, RestClient


class Api(BaseHTTPRequestHandler):
    """Answers as the API does; keeps what it was sent."""

    received: list[tuple[str, dict[str, str], bytes]] = []
    job_states: list[str] = []

    def do_GET(self) -> None:
        if self.path.startswith("/api/v1/jobs/"):
            state = self.job_states.pop(0)
            error = {"code": "diverged", "message": "the loss became NaN"} if state == "failed" else None
            self.answer(200, {"id": self.path.split("/")[4], "state": state, "error": error})
        elif self.path == "/api/v1/things/":
            self.answer(200, {"results": [1, 2], "next": f"http://{self.headers['Host']}/api/v1/things/?cursor=b"})
        elif self.path == "/api/v1/things/?cursor=b":
            self.answer(200, {"results": [3], "next": None})
        else:
            self.answer(404, {"code": "not_found", "message": "there is no such thing", "fields": {}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, dict(self.headers), body))
        if self.path == "/api/v1/trainings/":
            fields = {"steps": ["must be at least 1"]}
            self.answer(400, {"code": "invalid", "message": "one field is wrong", "fields": fields})
        elif self.path == "/api/v1/generations/":
            self.answer(202, {"id": f"job-{len(self.received)}", "state": "queued"})
        else:
            self.answer(201, {"ok": True})

    def answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def client() -> Iterator[RestClient]:
    Api.received, Api.job_states = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield RestClient(f"http://127.0.0.1:{server.server_port}", "lrs_key")
    server.shutdown()
    thread.join()
    server.server_close()


def test_lists_are_read_page_after_page(client: RestClient) -> None:
    assert list(client.all("things/")) == [1, 2, 3]


def test_a_job_is_submitted_with_the_key_and_an_idempotency_key_of_its_own(client: RestClient) -> None:
    for _ in range(2):
        client.submit("generations/", {"prompt": "a"})
    (path, first, body), (_, second, _) = Api.received
    assert (path, json.loads(body)) == ("/api/v1/generations/", {"prompt": "a"})
    assert first["Authorization"] == "Bearer lrs_key"
    assert first["Idempotency-Key"] != second["Idempotency-Key"]


def test_files_are_sent_byte_for_byte_with_their_names(client: RestClient, tmp_path: Path) -> None:
    content = b"\x89PNG\r\n\x1a\n--\r\n\x00"
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.txt").write_text("a red apple")
    client.upload("datasets/1/images/", [tmp_path / "a.png", tmp_path / "a.txt"])
    body = Api.received[0][2]
    assert b'name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + content + b"\r\n--" in body
    assert b'name="files"; filename="a.txt"\r\nContent-Type: text/plain\r\n\r\na red apple\r\n--' in body


def test_a_refusal_is_told_with_its_sentence_and_its_fields(client: RestClient) -> None:
    with pytest.raises(ApiError, match=r"POST trainings/: 400 one field is wrong steps: must be at least 1"):
        client.post("trainings/", {})
    with pytest.raises(ApiError, match="404 there is no such thing"):
        client.get("/api/v1/nothing/")


def test_a_job_is_watched_until_it_ends(client: RestClient) -> None:
    Api.job_states = ["running", "succeeded"]
    seen: list[str] = []
    done = client.wait_for_job({"id": "j", "state": "queued"}, lambda job: seen.append(job["state"]))
    assert done["state"] == "succeeded"
    assert seen == ["running", "succeeded"]


def test_a_failed_job_raises_its_own_sentence(client: RestClient) -> None:
    Api.job_states = ["failed"]
    with pytest.raises(ApiError, match="job j ended failed: the loss became NaN"):
        client.wait_for_job({"id": "j", "state": "running"}, lambda _: None)


def test_only_jobs_that_have_not_ended_are_cancelled_and_only_once(client: RestClient) -> None:
    ended, open_ = client.submit("generations/", {}), client.submit("generations/", {})
    Api.job_states = ["succeeded"]
    client.wait_for_job(ended, lambda _: None)
    Api.received.clear()
    client.cancel_open_jobs()
    client.cancel_open_jobs()
    assert [path for path, _, _ in Api.received] == [f"/api/v1/jobs/{open_['id']}/cancel/"]


def test_the_key_is_never_sent_to_another_site(client: RestClient) -> None:
    with pytest.raises(ApiError, match="the API key stays here"):
        client.get("http://127.0.0.1:9/api/v1/things/")


def test_a_studio_that_is_gone_is_told_as_such() -> None:
    with pytest.raises(ApiError, match="does not answer"):
        RestClient("http://127.0.0.1:9", "lrs_key").get("things/")
