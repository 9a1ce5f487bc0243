"""Database connections of threads and tasks that outlive a failover of the server."""

from django.db import connection


def connection_refresh() -> None:
    """Drop this thread's connection if an error has broken it, so that the next query opens a new one."""
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()
