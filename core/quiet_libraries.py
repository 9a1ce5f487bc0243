"""Silences the model libraries. Called before they load or save anything; our own log lines say what was done."""

import diffusers
import transformers


def quiet_libraries() -> None:
    """Stop progress bars and advice of diffusers and transformers; their errors are still shown."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
