"""Filters over columns, as `pyarrow.parquet.read_table` takes them."""

from collections.abc import Sequence
from functools import reduce
from operator import and_, or_
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion_pipeline.errors import FusionError

Predicate = tuple[str, str, Any]
Where: TypeAlias = Sequence[Predicate] | Sequence[Sequence[Predicate]] | pc.Expression

IMAGE = "image"
"""The encoded original bytes; a column of no table."""
_FORMS = (
    '. Filters are those of pyarrow.parquet.read_table: [("samples.width", ">=", 448)], lists of '
    "such lists (any of them), or an Expression"
)


class ReadingError(FusionError):
    """What was asked for is not there, or does not fit together; the message says what to do."""


def names_in(where: Sequence[Any]) -> list[str]:
    """The columns that filters name. Raises ReadingError."""
    try:
        names = [predicate[0] for every in _conjunctions(where) for predicate in every]
    except (IndexError, KeyError, TypeError) as error:
        raise _bad(where, f"no list of (column, operator, value){_FORMS}") from error
    if IMAGE in names:
        raise _bad(where, "the bytes of an image can't be compared")
    return names


def tables_of(where: Sequence[Predicate]) -> list[str]:
    """The tables that filters look at, each once. Raises ReadingError."""
    columns = (name.partition("[")[0] for name in names_in(where))
    return [table for table in dict.fromkeys(c.rpartition(".")[0] for c in columns) if table]


def to_expression(where: Where, schema: pa.Schema) -> pc.Expression:
    """The filter, tried on no rows of these columns. Raises ReadingError."""
    try:
        expression = where if isinstance(where, pc.Expression) else _any_of(where, schema)
        schema.empty_table().filter(expression)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        why = str(error).partition("\n")[0]
        if not isinstance(error, pa.ArrowException):
            why += _FORMS
        if isinstance(where, pc.Expression):
            why += f" (an Expression sees the selected columns: {', '.join(schema.names)})"
        raise _bad(where, why) from error
    return expression


def _conjunctions(where: Sequence[Any]) -> Sequence[Any]:
    return [where] if isinstance(where[0][0], str) else where


def _any_of(where: Sequence[Any], schema: pa.Schema) -> pc.Expression:
    held = [[_holds(one, schema) for one in every] for every in _conjunctions(where)]
    return reduce(or_, (reduce(and_, every) for every in held))


def _holds(predicate: Predicate, schema: pa.Schema) -> pc.Expression:
    """As pyarrow has it, but that a null holds for `not in` no more than for others, and that
    numbers are compared as they would be stored: 0.3 is not less than a score of 0.3."""
    name, operator, value = predicate
    if pa.types.is_float32(schema.field(name).type):
        is_list = isinstance(value, list | tuple | set)
        asked = value if is_list else [value]
        stored = [np.float32(one) if isinstance(one, float) else one for one in asked]
        value = stored if is_list else stored[0]
    expression = pq.filters_to_expression([(name, operator, value)])
    return expression & pc.field(name).is_valid() if operator == "not in" else expression


def _bad(where: object, why: str) -> ReadingError:
    return ReadingError(f"where={where!s}: {why}.")
