"""What the commands of `core` share: options made from a configuration class, progress bars, errors as one sentence."""

import argparse
import logging
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from tqdm import tqdm

from core.config import Config
from core.errors import CoreError, Interrupted
from core.progress import Progress

ConfigT = TypeVar("ConfigT", bound=Config)


def parser(module: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with an example that works."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"example: {example}",
    )


def add_config_options(
    options: argparse.ArgumentParser,
    config: type[Config],
    *,
    skip: Collection[str] = (),
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add one option per field of a configuration, with its description, default and choices.

    Values stay text: `read_config` gives them to the class, which checks them as it checks REST input and YAML.

    Args:
        options: Gets a group named after the class.
        config: Its scalar fields become options; fields that hold several values are the caller's.
        skip: Names of fields to leave out.
        defaults: What the help says of fields whose default the command finds by itself.
    """
    group = options.add_argument_group(f"{config.__name__} (the same names as in YAML and REST)")
    for name, field in config.model_fields.items():
        if name in skip:
            continue
        choices = _choices(field)
        flag = f"--{name.replace('_', '-')}"
        text = (field.description or name).replace("%", "%%")
        required = field.is_required()
        if not required:
            text += f" Default: {(defaults or {}).get(name, _as_text(field))}."
        if field.annotation is bool:
            group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = None if choices else name.upper()
            group.add_argument(flag, dest=name, choices=choices, metavar=metavar, required=required, help=text)


def read_config(config: type[ConfigT], given: argparse.Namespace, **extra: object) -> ConfigT:
    """The configuration that the options of `add_config_options` describe.

    Args:
        config: The class.
        given: Parsed options; those that were not given keep the class's default.
        extra: Fields that the command set by other means.

    Raises:
        ConfigError: Names every wrong option.
    """
    values = {name: value for name in config.model_fields if (value := getattr(given, name, None)) is not None}
    return config.parse(values | extra)


class ProgressBar:
    """A `Report` that draws one tqdm bar per stage on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        """Show one step."""
        if self._bar is None or self._stage != progress.stage:
            self.close()
            self._bar = tqdm(total=progress.total, desc=progress.stage)
            self._stage = progress.stage
        if progress.figures:
            self._bar.set_postfix(progress.figures, refresh=False)
        self._bar.update(progress.step - self._bar.n)

    def close(self) -> None:
        """Finish the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; an expected error becomes one sentence on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    try:
        main()
    except CoreError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from error
    except (Interrupted, KeyboardInterrupt) as error:
        sys.stderr.write("stopped\n")
        raise SystemExit(130) from error


def _choices(field: FieldInfo) -> list[str] | None:
    """The allowed words of a `Literal` field."""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return [str(word) for word in typing.get_args(annotation)]
    return None


def _as_text(field: FieldInfo) -> str:
    if field.default is PydanticUndefined or field.default is None:
        return "none"
    return repr(field.default) if isinstance(field.default, str) else str(field.default)
