"""The relay relays, and each of its faults is the fault that its name says."""

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.chaos.fault_proxy import Fault, FaultProxy, Loop

BODY = b"0123456789" * 1000


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    loop = Loop()
    made = FaultProxy(loop, ("127.0.0.1", server.server_address[1]))
    yield made
    made.close()
    loop.close()
    server.shutdown()


def get(proxy: FaultProxy, seconds: float = 5.0) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/", timeout=seconds) as answer:
        content: bytes = answer.read()
    return content


def test_without_a_fault_every_byte_passes(proxy: FaultProxy) -> None:
    assert get(proxy) == BODY


def test_latency_delays_and_loses_nothing(proxy: FaultProxy) -> None:
    proxy.set(Fault.LATENCY, 0.3)
    began = time.monotonic()
    assert get(proxy) == BODY
    assert time.monotonic() - began >= 0.3


def test_a_stall_ends_with_every_byte(proxy: FaultProxy) -> None:
    proxy.set(Fault.STALL)
    with pytest.raises(TimeoutError):
        get(proxy, 0.3)
    threading.Timer(0.5, proxy.set, [Fault.NONE]).start()
    assert get(proxy) == BODY


def test_a_black_hole_swallows_bytes_and_resets_what_lost_some(proxy: FaultProxy) -> None:
    proxy.set(Fault.BLACK_HOLE)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(5)
        proxy.set(Fault.NONE)
        with contextlib.suppress(ConnectionResetError):  # RST or FIN: which of the two is the kernel's choice.
            assert client.recv(1) == b""
    assert get(proxy) == BODY


def test_truncation_cuts_the_answer(proxy: FaultProxy) -> None:
    proxy.set(Fault.TRUNCATE, 300)
    with pytest.raises((OSError, urllib.error.URLError)):
        get(proxy)
    proxy.set(Fault.NONE)
    assert get(proxy) == BODY


def test_refusing_means_that_nobody_listens_and_ends_at_the_same_port(proxy: FaultProxy) -> None:
    port = proxy.port
    proxy.set(Fault.REFUSE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    proxy.set(Fault.NONE)
    assert proxy.port == port
    assert get(proxy) == BODY


@pytest.mark.parametrize(("fault", "status"), [(Fault.HTTP_500, 500), (Fault.HTTP_503, 503)])
def test_http_faults_answer_in_place_of_the_server(proxy: FaultProxy, fault: Fault, status: int) -> None:
    proxy.set(fault)
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(proxy)
    assert caught.value.code == status
    assert b"<Error>" in caught.value.read()


def test_a_reset_cuts_open_connections_and_lets_new_ones_in(proxy: FaultProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(0.2)
        assert proxy.reset() == 2
        with pytest.raises(ConnectionResetError):
            while client.recv(100):
                pass
    assert get(proxy) == BODY
