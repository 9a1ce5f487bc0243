"""`python -m lorasite.env_example > deploy/env.example`: every variable, its meaning, its default."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from lorasite.environment import REPOSITORY, Environment

HEAD = """\
# Settings of lorasite, all with their defaults. Made by: python -m lorasite.env_example > deploy/env.example
# Take the '#' from the lines that you change. Lists are JSON.
"""


def env_example() -> str:
    """The whole file."""
    parts = [HEAD]
    for name, field in Environment.model_fields.items():
        comment = textwrap.fill(field.description or "", 100, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{comment}\n#LORASITE_{name.upper()}={_text(field.default)}\n")
    return "\n".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value.relative_to(REPOSITORY)) if value.is_relative_to(REPOSITORY) else str(value)
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write(env_example())
