"""One call that makes a child process die when its parent does, so that `kill -9` never leaves work behind."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(expected_parent_pid: int | None = None) -> None:
    """Ask Linux to send SIGKILL to this process when its parent thread ends (prctl(2)). No-op elsewhere.

    Args:
        expected_parent_pid: When given and the parent is another process by now, exit at once: it died before
            this call.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # Not Linux: the lease still protects the work.
    if expected_parent_pid is not None and os.getppid() != expected_parent_pid:
        os._exit(1)
