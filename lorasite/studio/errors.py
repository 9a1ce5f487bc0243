"""Why a studio does not start or cannot go on."""


class StudioError(Exception):
    """A sentence for the person at the terminal: what is wrong, and what to do."""


class StopRequested(Exception):
    """Ctrl-C or SIGTERM came while the studio was still starting."""
