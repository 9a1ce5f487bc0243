"""How log lines look: structlog renders, all code logs through the standard library. Called by the settings."""

import logging
import logging.config
from typing import Literal

import structlog


def logging_settings(log_format: Literal["console", "json"], level: str) -> None:
    """Configure the root logger: one line per record on stderr, for people or as JSON."""
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso" if log_format == "json" else "%H:%M:%S", utc=log_format == "json"),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]
    renderer: structlog.types.Processor
    if log_format == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "lines": {
                    "()": structlog.stdlib.ProcessorFormatter,
                    "foreign_pre_chain": shared,
                    "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
            "root": {"handlers": ["stderr"], "level": level},
            "loggers": {
                # These tell nothing that an operator acts on.
                "urllib3": {"level": "WARNING"},
                "botocore": {"level": "WARNING"},
                "boto3": {"level": "WARNING"},
                "s3transfer": {"level": "WARNING"},
                "PIL": {"level": "WARNING"},
                "celery.worker.strategy": {"level": "WARNING"},  # doorbells; our own lines tell of the jobs
                "celery.app.trace": {"level": "WARNING"},
            },
        }
    )
