"""A web node installs requirements/web.txt alone: API, admin and docs must work without torch or numpy."""

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.services import free_ports, running, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_web_process_from_the_web_requirements_serves_api_admin_and_docs(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "-r", "requirements/web.txt"]
    subprocess.run(install, cwd=REPOSITORY, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LORASITE_", "DJANGO_"))}
    environment |= {"LORASITE_DATA": str(tmp_path / "data"), "LORASITE_SECRET_KEY": secrets.token_urlsafe(48)}

    absent = "import importlib.util as u; print([n for n in ('torch', 'numpy', 'diffusers') if u.find_spec(n)])"
    assert subprocess.run([str(python), "-c", absent], capture_output=True, text=True).stdout.strip() == "[]"
    for command in (["migrate", "--verbosity", "0"], ["collectstatic", "--noinput", "--verbosity", "0"]):
        subprocess.run([str(python), "manage.py", *command], cwd=REPOSITORY, env=environment, check=True)

    (port,) = free_ports(1)
    log = tmp_path / "web.log"
    serve = [
        str(python),
        "-m",
        "uvicorn",
        "lorasite.asgi:application",
        "--port",
        str(port),
        "--app-dir",
        str(REPOSITORY),
    ]
    with running(serve, log, env=environment):

        def get(path: str) -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()
            except OSError:
                return 0, b""

        wait_until(lambda: get("/healthz")[0] == 200, "the web process answers", log=log)
        assert get("/admin/login/")[0] == 200
        assert b"/api/v1/trainings/" in get("/api/schema/")[1]
        assert get("/api/docs/")[0] == 200
        status, body = get("/api/v1/jobs/")
        assert status == 401
        assert json.loads(body)["code"] == "not_authenticated"
