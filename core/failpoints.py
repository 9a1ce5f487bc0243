"""Names for every side effect of a job's life, so that tests can make the process die, fail, hang or freeze there.

`with side_effect("lease.renew"):` marks the points `lease.renew:before` and `lease.renew:after`. Nothing happens at
them unless a test installed a hook in this very process; no setting, variable or message can do that.
"""

from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType

Hook = Callable[[str], None]

_hook: Hook | None = None


def install(hook: Hook | None) -> None:
    """Call `hook(point)` at every point of this process from now on; None takes it away."""
    global _hook
    _hook = hook


class side_effect(ContextDecorator):
    """Marks one write to a database, file, store, broker or process, as a context or a decorator.

    Costs two comparisons (below a microsecond) when no hook is installed.

    Args:
        name: Unique in the source tree, `subject.verb`; `tests/chaos/` enumerates all of them.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _hook is not None:
            _hook(f"{self.name}:before")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and _hook is not None:
            _hook(f"{self.name}:after")
