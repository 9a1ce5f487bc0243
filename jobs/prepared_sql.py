"""Statements of the ORM that are compiled once per process and then only sent, for paths where each one is run often.

Django builds and compiles a statement anew at every run, which takes longer than the database needs to answer.
PostgreSQL plans each statement once per connection. What is here knows no table: the statements stand with the code
that sends them.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Expression, Field, Model, QuerySet, Value
from django.db.models.sql import InsertQuery, UpdateQuery
from django.db.models.sql.compiler import SQLCompiler


class Parameter(Expression):
    """Stands in a statement for a value that each run brings along.

    Args:
        name: Keyword under which a run brings it.
        output_field: Turns the value into what the database takes.
    """

    def __init__(self, name: str, output_field: "Field[Any, Any]") -> None:
        super().__init__(output_field=output_field)
        self.name = name

    def as_sql(self, compiler: SQLCompiler, connection: Any) -> tuple[str, Any]:
        """A placeholder whose parameter is this object itself, until a run replaces it."""
        return "%s", [self]


@dataclass(frozen=True, eq=False)
class _Compiled:
    sql: str
    params: tuple[Any, ...]
    columns: tuple[tuple[int, Any], ...] = ()
    """(place, column) of those whose values in this kind of database are not yet Python's."""


class _Statement(ABC):
    """Compiled at its first run; a second thread that does so at the same time does it for nothing."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._compiled: dict[tuple[Hashable, ...], _Compiled] = {}

    def _ready(self, connection: BaseDatabaseWrapper, shape: tuple[Hashable, ...]) -> _Compiled:
        # The kind of database is the key and no connection: processes fork, threads open connections of their own.
        key = (connection.vendor, *shape)
        if key not in self._compiled:
            # Django compiles row locks inside a transaction only; on PostgreSQL an empty one sends nothing.
            with transaction.atomic(savepoint=False) if connection.vendor == "postgresql" else nullcontext():
                self._compiled[key] = self._compile(connection, shape)
        return self._compiled[key]

    def run(self, *shape: Hashable, **values: Any) -> "Run":
        """What `send` takes."""
        return Run(self, shape, values)

    @abstractmethod
    def _compile(self, connection: BaseDatabaseWrapper, shape: tuple[Hashable, ...]) -> _Compiled: ...

    @abstractmethod
    def _result(self, cursor: Any, compiled: _Compiled, connection: BaseDatabaseWrapper) -> Any: ...


class Read(_Statement):
    """A query for rows of columns.

    Args:
        build: Makes the queryset, with `values_list` of its columns, for the shape of a run.
    """

    def rows(self, *shape: Hashable, **values: Any) -> list[list[Any]]:
        """Send it.

        Args:
            shape: What changes the statement's text, such as how many values there are; each is compiled by itself.
            values: Of its parameters.
        """
        (rows,) = send(self.run(*shape, **values))
        return rows  # type: ignore[no-any-return]

    def _result(self, cursor: Any, compiled: _Compiled, connection: BaseDatabaseWrapper) -> list[list[Any]]:
        rows = [list(row) for row in cursor.fetchall()]
        for number, column in compiled.columns:
            for convert in _converters(column, connection):
                for row in rows:
                    row[number] = convert(row[number], column, connection)
        return rows

    def _compile(self, connection: BaseDatabaseWrapper, shape: tuple[Hashable, ...]) -> _Compiled:
        queryset: QuerySet[Any, Any] = self._build(*shape)
        compiler = queryset.query.get_compiler(using=connection.alias)
        sql, params = compiler.as_sql()
        columns = enumerate(column[0] for column in compiler.select[: compiler.col_count])
        converted = tuple((number, column) for number, column in columns if _converters(column, connection))
        return _Compiled(sql, tuple(params), converted)


class Write(_Statement):
    """An UPDATE or INSERT. Call `write` inside a `side_effect` and a transaction.

    Args:
        build: Makes an `update_of` or `insert_of`.
    """

    def write(self, **values: Any) -> int:
        """Send it with these values of its parameters. Returns how many rows it changed or made."""
        (count,) = send(self.run(**values))
        return int(count)

    def _result(self, cursor: Any, compiled: _Compiled, connection: BaseDatabaseWrapper) -> int:
        return int(cursor.rowcount)

    def _compile(self, connection: BaseDatabaseWrapper, shape: tuple[Hashable, ...]) -> _Compiled:
        statement = self._build(*shape).get_compiler(using=connection.alias).as_sql()
        # An INSERT comes as a list, here of one.
        sql, params = statement[0] if isinstance(statement, list) else statement
        return _Compiled(sql, tuple(params))


class InsertFrom(Write):
    """An INSERT of a row for each that a query finds.

    Args:
        build: Makes (model, queryset, {column: expression over the query's rows}); columns that it leaves out get the
            model's defaults.
    """

    def _compile(self, connection: BaseDatabaseWrapper, shape: tuple[Hashable, ...]) -> _Compiled:
        model, rows, given = self._build(*shape)
        row, quote = model(), connection.ops.quote_name
        fields = [field for field in model._meta.concrete_fields if field is not model._meta.auto_field]
        values = [given.get(field.attname, Value(getattr(row, field.attname), output_field=field)) for field in fields]
        names = ", ".join(quote(field.column) for field in fields)
        sql, params = rows.values_list(*values).query.get_compiler(using=connection.alias).as_sql()
        return _Compiled(f"INSERT INTO {quote(model._meta.db_table)} ({names}) {sql}", tuple(params))


@dataclass(frozen=True)
class Run:
    """A statement with the values of one run."""

    statement: _Statement
    shape: tuple[Hashable, ...]
    values: dict[str, Any]


def send(*runs: Run) -> list[Any]:
    """Send statements one after the other, on PostgreSQL in one round trip; each sees what others committed until then.

    Writes belong into a `side_effect` of the caller's, and several statements into a transaction.

    Returns:
        Of each in order the rows or the number of changed rows.
    """
    connection = connections[DEFAULT_DB_ALIAS]
    ready = [(run.statement, run.statement._ready(connection, run.shape), run.values) for run in runs]
    results = []
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            # Values are bound by the client (Django's default), which lets one message carry several statements.
            texts = [_planned(cursor, compiled, connection) for _, compiled, _ in ready]
            params = [
                param
                for text, (_, compiled, values) in zip(texts, ready, strict=True)
                for param in _params(compiled, values, connection, constants=text is compiled.sql)
            ]
            cursor.execute("; ".join(texts), params)
        for number, (statement, compiled, values) in enumerate(ready):
            if connection.vendor != "postgresql":
                cursor.execute(compiled.sql, _params(compiled, values, connection))
            elif number:
                cursor.nextset()
            results.append(statement._result(cursor, compiled, connection))
    return results


def send_whole(*runs: Run) -> list[Any]:
    """`send` as one transaction: all of it or nothing. Several writes take one round trip on PostgreSQL."""
    connection = connections[DEFAULT_DB_ALIAS]
    if connection.vendor == "postgresql" and not connection.in_atomic_block and connection.get_autocommit():
        return send(*runs)  # There a message of several statements is a transaction, and needs no BEGIN and COMMIT.
    with transaction.atomic():
        return send(*runs)


def parameters(name: str, count: int, output_field: "Field[Any, Any]") -> list[Any]:
    """For `__in`: a run brings its values by `listed(name, count, values)`."""
    return [Parameter(f"{name}_{number}", output_field) for number in range(count)]


def listed(name: str, count: int, values: Iterable[Any]) -> dict[str, Any]:
    """Values of `parameters(name, count, ...)`; the last one again and again where there are fewer than `count`."""
    given = list(values)
    return {f"{name}_{number}": given[min(number, len(given) - 1)] for number in range(count)}


def rounded_up(count: int) -> int:
    """The next power of two: lists of all lengths share few compiled statements."""
    return 1 << max(0, count - 1).bit_length()


def update_of(rows: "QuerySet[Any]", **columns: Any) -> UpdateQuery:
    """`rows.update(**columns)`, not run."""
    query: Any = rows.query.chain(UpdateQuery)
    query.add_update_values(columns)
    return query


def insert_of(row: Model) -> InsertQuery:
    """`row.save(force_insert=True)`, not run; the database numbers the row, and nobody asks for the number."""
    fields = [field for field in row._meta.concrete_fields if field is not row._meta.auto_field]
    query = InsertQuery(type(row))
    query.insert_values(fields, [row])
    return query


def _params(
    compiled: _Compiled, values: dict[str, Any], connection: BaseDatabaseWrapper, *, constants: bool = True
) -> list[Any]:
    return [
        param.output_field.get_db_prep_value(values[param.name], connection) if isinstance(param, Parameter) else param
        for param in compiled.params
        if constants or isinstance(param, Parameter)
    ]


_plans: "WeakKeyDictionary[Any, dict[_Compiled, str]]" = WeakKeyDictionary()
_plan_numbers = count(1)


def _planned(cursor: Any, compiled: _Compiled, connection: BaseDatabaseWrapper) -> str:
    """The EXECUTE of a statement, prepared on this connection where it is not yet.

    Where a pooler hands out connections per transaction, which Django is told by `DISABLE_SERVER_SIDE_CURSORS`, nothing
    stays prepared: there it is the statement itself.
    """
    if connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        return compiled.sql
    plans = _plans.setdefault(connection.connection, {})
    if compiled not in plans:
        types = [param.output_field.db_type(connection) for param in compiled.params if isinstance(param, Parameter)]
        name, numbers, given = f"lorasite_{next(_plan_numbers)}", count(1), iter(compiled.params)

        def place(match: re.Match[str]) -> str:
            if match[0] != "%s":
                return match[0]
            return f"${next(numbers)}" if isinstance(next(given), Parameter) else "%s"

        sql = re.sub("%[%s]", place, compiled.sql)
        constants = [param for param in compiled.params if not isinstance(param, Parameter)]
        declared = f"({', '.join(map(str, types))})" if types else ""
        cursor.execute(f"PREPARE {name} {declared} AS {sql}", constants)
        places = f"({', '.join(['%s'] * len(types))})" if types else ""
        plans[compiled] = f"EXECUTE {name}{places}"
    return plans[compiled]


def _converters(column: Any, connection: BaseDatabaseWrapper) -> list[Any]:
    return [*connection.ops.get_db_converters(column), *column.get_db_converters(connection)]
