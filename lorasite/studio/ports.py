"""Loopback ports of a studio."""

import errno
import socket

from lorasite.studio.errors import StudioError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


def check_port_is_free(port: int) -> None:
    """Say in a sentence that a port cannot be used, instead of a traceback of the web server.

    Raises:
        StudioError: The port is taken, reserved, or no port number.
    """
    if not 1 <= port <= 65535:
        raise StudioError(f"{port} is not a port: choose --port between 1024 and 65535")
    try:
        socket.create_server((LOOPBACK, port)).close()
    except PermissionError:
        raise StudioError(f"port {port} is reserved for root: choose --port 1024 or higher") from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise StudioError(f"port {port} cannot be used: {error}") from error
        raise StudioError(
            f"port {port} on {LOOPBACK} is taken by another program: stop it, or choose another one with --port"
        ) from None
