"""A TCP relay on a loopback port that can be told to misbehave: slow, stalled, cut off, refusing, answering 5xx.

One thread with its own event loop serves all proxies. It knows nothing of what it relays, except for the HTTP answers.
"""

import asyncio
import socket
import struct
import threading
from concurrent.futures import Future
from enum import Enum
from typing import Any

CHUNK_BYTES = 65_536
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>Try again.</Message></Error>"


class Fault(Enum):
    """What a proxy does to its connections while the fault lasts."""

    NONE = "none"
    LATENCY = "latency"  # every chunk arrives `argument` seconds late
    STALL = "stall"  # bytes wait until the fault ends, none is lost
    BLACK_HOLE = "black_hole"  # bytes vanish; connections that lost some are reset when the fault ends
    TRUNCATE = "truncate"  # each connection is reset after `argument` more bytes of its answers
    REFUSE = "refuse"  # nobody listens, existing connections are reset
    HTTP_500 = "http_500"
    HTTP_503 = "http_503"


class Loop:
    """The event loop thread of all proxies of this process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fault-proxies", daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine there and wait for its result."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(timeout=30)

    def close(self) -> None:
        """Stop the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)


class FaultProxy:
    """Relays `127.0.0.1:port` to `target`. `set` begins a fault, `set(Fault.NONE)` ends it; `reset` cuts all once."""

    def __init__(self, loop: Loop, target: tuple[str, int]) -> None:
        self._loop, self._target = loop, target
        self._fault, self._argument = Fault.NONE, 0.0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._lossy: set[asyncio.StreamWriter] = set()
        self._healthy = asyncio.Event()
        self.connections = 0
        self.port = 0
        loop.run(self._listen())

    def set(self, fault: Fault, argument: float = 0.0) -> None:
        """Begin a fault, or end it. `argument`: seconds for LATENCY, bytes for TRUNCATE."""
        self._loop.run(self._set(fault, argument))

    def reset(self) -> int:
        """Cut every open connection with an RST. Returns how many sockets were closed."""
        count: int = self._loop.run(self._reset())
        return count

    def close(self) -> None:
        """Stop listening and cut everything."""
        self._loop.run(self._close())

    async def _listen(self) -> None:
        self._healthy.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, fault: Fault, argument: float) -> None:
        before, self._fault, self._argument = self._fault, fault, argument
        (self._healthy.clear if fault == Fault.STALL else self._healthy.set)()
        if before == Fault.BLACK_HOLE:
            for writer in list(self._lossy):
                _abort(writer)
            self._lossy.clear()
        if fault in (Fault.REFUSE, Fault.HTTP_500, Fault.HTTP_503):
            await self._reset()
        if fault == Fault.REFUSE and self._server is not None:
            self._server.close()
            self._server = None
        elif fault != Fault.REFUSE and self._server is None:
            await self._listen()
            (self._healthy.clear if fault == Fault.STALL else self._healthy.set)()

    async def _reset(self) -> int:
        count = len(self._writers)
        for writer in list(self._writers):
            _abort(writer)
        return count

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._healthy.set()
        await self._reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        upstream: asyncio.StreamWriter | None = None
        try:
            if self._fault in (Fault.HTTP_500, Fault.HTTP_503):
                await self._answer(reader, writer)
                return
            from_target, upstream = await asyncio.open_connection(*self._target)
            self._writers.add(upstream)
            await asyncio.gather(
                self._relay(reader, upstream, answers=False), self._relay(from_target, writer, answers=True)
            )
        except (OSError, asyncio.IncompleteReadError):
            pass  # One side is gone: cutting the other is all a relay can do.
        finally:
            for side in (writer, upstream):
                if side is not None:
                    self._writers.discard(side)
                    self._lossy.discard(side)
                    side.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        allowed: float | None = None
        while chunk := await reader.read(CHUNK_BYTES):
            await self._healthy.wait()
            if self._fault == Fault.LATENCY:
                await asyncio.sleep(self._argument)
            if self._fault == Fault.BLACK_HOLE:
                self._lossy.add(writer)
                continue
            if self._fault == Fault.TRUNCATE and answers:
                allowed = self._argument if allowed is None else allowed
                if len(chunk) > allowed:
                    writer.write(chunk[: int(allowed)])
                    await writer.drain()
                    _abort(writer)
                    raise ConnectionResetError
                allowed -= len(chunk)
            elif self._fault != Fault.TRUNCATE:
                allowed = None
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One 5xx in place of the server's answer, after the whole head was read."""
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=5)
        status, body = (b"500 Internal Server Error", INTERNAL)
        if self._fault == Fault.HTTP_503:
            status, body = b"503 Slow Down", SLOW_DOWN
        head = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        writer.write(head % (status, len(body)) + body)
        await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN: linger for zero seconds."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
