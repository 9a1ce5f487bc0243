"""A small client of the REST API, standard library only: what `demo/run.py` drives the studio with.

Knows the API's conventions (bearer key, one error shape, 202 with a job, cursor pages), not what the demo wants.
"""

import json
import mimetypes
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60
TERMINAL = ("succeeded", "failed", "cancelled", "expired")


class ApiError(Exception):
    """The API refused a request, or a job did not succeed; the text says why."""


class RestClient:
    """One studio and one API key.

    Args:
        site: Address without a path, e.g. "http://127.0.0.1:8000".
        key: An API key, "lrs_...".
    """

    def __init__(self, site: str, key: str) -> None:
        self.site, self._key = site.rstrip("/"), key
        self._open_jobs: set[str] = set()

    def get(self, path: str) -> Any:
        """JSON of one address; `path` may start with "/" or be relative to /api/v1/."""
        return json.loads(self._send("GET", path))

    def all(self, path: str) -> Iterator[Any]:
        """Every row of a list, page after page."""
        while path:
            page = self.get(path)
            yield from page["results"]
            path = page["next"] or ""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON."""
        return json.loads(self._send("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}))

    def submit(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send JSON that makes a job; returns the job. `cancel_open_jobs` knows it until it is waited for."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        job: dict[str, Any] = json.loads(self._send("POST", path, json.dumps(body).encode(), headers))
        self._open_jobs.add(job["id"])
        return job

    def upload(self, path: str, files: Sequence[Path]) -> Any:
        """Send files as the parts `files` of one multipart request."""
        boundary = uuid.uuid4().hex
        body = bytearray()
        for file in files:
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            head = f'Content-Disposition: form-data; name="files"; filename="{file.name}"\r\nContent-Type: {kind}'
            body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + file.read_bytes() + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        return json.loads(
            self._send("POST", path, bytes(body), {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        )

    def download(self, path: str, destination: Path) -> Path:
        """Write the bytes of one address to `destination`."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(self._send("GET", path))
        return destination

    def wait_for_job(self, job: dict[str, Any], watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Poll a job until it ends, telling `watch` each answer.

        Raises:
            ApiError: It did not succeed; the text holds the job's own sentence.
        """
        while job["state"] not in TERMINAL:
            time.sleep(0.5)
            job = self.get(f"jobs/{job['id']}/")
            watch(job)
        self._open_jobs.discard(job["id"])
        if job["state"] != "succeeded":
            error = job.get("error") or {}
            raise ApiError(f"job {job['id']} ended {job['state']}: {error.get('message') or 'no reason given'}")
        return job

    def cancel_open_jobs(self) -> None:
        """Cancel what was submitted and has not ended, as far as the studio still answers."""
        for job_id in sorted(self._open_jobs):
            with suppress(ApiError):
                self.post(f"jobs/{job_id}/cancel/", {})
        self._open_jobs.clear()

    def _send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        if path.startswith("/"):
            url = self.site + path
        elif path.startswith("http"):
            url = path
        else:
            url = f"{self.site}/api/v1/{path}"
        if not url.startswith(self.site + "/"):
            raise ApiError(f"{url} is not on {self.site}: the API key stays here")
        request = urllib.request.Request(url, data=body, method=method, headers=headers or {})  # noqa: S310 checked above
        request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise ApiError(f"{method} {path}: {error.code} {_reason(error.read())}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ApiError(f"{method} {path}: the studio does not answer ({error})") from error


def _reason(body: bytes) -> str:
    """The sentence and the fields of an error answer; its first characters where it has another shape."""
    try:
        answer = json.loads(body)
        fields = "; ".join(f"{name}: {' '.join(reasons)}" for name, reasons in answer["fields"].items())
        return f"{answer['message']} {fields}".strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:200].decode(errors="replace")
