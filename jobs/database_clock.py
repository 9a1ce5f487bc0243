"""The one clock that decides leases: the database's. Clocks of workers are never compared with each other."""

from datetime import timedelta
from typing import Any

from django.db.models import DateTimeField, Expression, ExpressionWrapper, Value
from django.db.models.functions import Now


def later_by(duration: Expression) -> Any:
    """SQL expression: the database's time plus a duration in SQL."""
    return ExpressionWrapper(Now() + duration, output_field=DateTimeField())


def after(seconds: float) -> Any:
    """SQL expression: the database's time plus `seconds` (may be negative).

    `Now()` is the statement's time on PostgreSQL, not the transaction's: a long transaction sees no frozen clock.
    """
    return ExpressionWrapper(Now() + Value(timedelta(seconds=seconds)), output_field=DateTimeField())
