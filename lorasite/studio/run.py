"""The course of a studio, from the first check to the last child's end. Called by `manage.py studio`."""

import http.client
import importlib.util
import json
import os
import time
from pathlib import Path

from jobs.management.commands.first_operator import CHANGED
from lorasite.studio.console import Console
from lorasite.studio.credentials import studio_credentials
from lorasite.studio.errors import StopRequested, StudioError
from lorasite.studio.ownership import own_data_folder
from lorasite.studio.plan import STOP_ORDER, Plan
from lorasite.studio.ports import LOOPBACK, check_port_is_free, free_port
from lorasite.studio.processes import Supervisor
from lorasite.studio.valkey import valkey_answers, valkey_binary

NEEDED = {"torch": "the workers' tensor library", "uvicorn": "the web server", "celery": "the task system"}
WORKERS = 2  # one for each queue
ASK_SECONDS = 1.0  # between two questions to /readyz
PATIENCE_SECONDS = 60.0  # before it is said what the start waits for


def run_studio(*, data: Path, port: int, with_demo: bool) -> None:
    """Run until Ctrl-C, SIGTERM or a failure; nothing is left running afterwards.

    Raises:
        StudioError: With a sentence for the person.
    """
    _check_packages()
    binary = valkey_binary()
    data = data.resolve()
    try:
        for folder in (data / "studio", data / "logs"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StudioError(f"the data folder {data} cannot be used: {error}; choose another one with --data") from error
    with own_data_folder(data / "studio") as note:
        check_port_is_free(port)
        plan = Plan(data, port, free_port(), binary, studio_credentials(data / "studio"), with_demo)
        console = Console(data / "logs")
        supervisor = Supervisor(console)
        supervisor.listen_for_signals()
        if note:
            console.say(note)
        if os.geteuid() == 0:
            console.say("running as root: an account without rights is safer where others can log in")
        try:
            _start(plan, supervisor, console)
            supervisor.keep_alive(until=lambda: False)
        except StopRequested:
            console.say("stopping: workers save their work first (again Ctrl-C: stop at once) ...")
        finally:
            supervisor.stop(*STOP_ORDER)
            console.say("stopped; everything is kept in " + str(data))
            console.close()


def _start(plan: Plan, supervisor: Supervisor, console: Console) -> None:
    """1. broker; 2. database, files, account, demo base; 3. what stays; 4. wait until it is ready; 5. say where."""
    began = time.monotonic()
    console.say(f"starting on {plan.data} ...")
    supervisor.start(plan.valkey())
    supervisor.run_once(plan.migrate())
    supervisor.run_once(plan.collect_static())
    account = supervisor.run_once(plan.operator())
    demo = plan.demo()
    if demo is not None:
        supervisor.run_once(demo)
    supervisor.keep_alive(until=lambda: valkey_answers(plan.broker_url))
    for program in plan.programs():
        supervisor.start(program)
    _await_ready(plan, supervisor, console)
    changed = account[-1:] == [CHANGED]
    password = "the one that you chose" if changed else plan.credentials.admin_password
    console.say(f"ready after {time.monotonic() - began:.0f} s")
    console.say("")
    console.say(f"    open   {plan.url}")
    console.say(f"    login  admin   password {password}")
    console.say("")
    console.say(f"data and logs are in {plan.data}; stop with Ctrl-C")


def _await_ready(plan: Plan, supervisor: Supervisor, console: Console) -> None:
    said_at = asked_at = time.monotonic()

    def ready() -> bool:
        nonlocal said_at, asked_at
        now = time.monotonic()
        if now - asked_at < ASK_SECONDS:
            return False
        asked_at = now
        problems = _problems(plan.web_port)
        if problems and now - said_at > PATIENCE_SECONDS:
            console.say("still waiting: " + "; ".join(problems))
            said_at = now
        return not problems

    supervisor.keep_alive(until=ready)


def _problems(port: int) -> list[str]:
    """What /readyz still misses; empty when people can work."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return ["the web process does not answer yet"]
    finally:
        connection.close()
    try:
        report = json.loads(body)
        problems = [str(problem) for problem in report["problems"]]
        if not problems and report["workers"].get("ready", 0) < WORKERS:
            problems = ["the second worker is still loading"]
    except (ValueError, KeyError, TypeError):
        return [f"the web process answers with status {answer.status}; see logs/web.log"]
    return problems


def _check_packages() -> None:
    for package, purpose in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise StudioError(f"the package {package} ({purpose}) is not installed: run `make setup`")
