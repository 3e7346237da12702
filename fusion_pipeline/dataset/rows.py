"""Building tables row by row: the shape that most workers share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.schemas import stage_schema


@dataclass(frozen=True, slots=True)
class Ok:
    values: Mapping[str, Any]
    """One value for each column of the stage."""


@dataclass(frozen=True, slots=True)
class NotOk:
    status: str
    """filtered or failed."""
    reason: str
    values: Mapping[str, Any] | None = None
    """What is known all the same (the score that a rule was applied to)."""


Outcome = Ok | NotOk


def build_table(
    keys: Sequence[str], outcomes: Sequence[Outcome], columns: Sequence[pa.Field]
) -> pa.Table:
    """A stage's table from one outcome a row; columns of a row that is not ok are null."""
    data: dict[str, list[Any]] = {field.name: [] for field in columns}
    for outcome in outcomes:
        values = outcome.values or {}
        for name, column in data.items():
            column.append(values.get(name))
    status = ["ok" if isinstance(o, Ok) else o.status for o in outcomes]
    reason = [None if isinstance(o, Ok) else o.reason for o in outcomes]
    return pa.table(
        {"key": list(keys), "status": status, "reason": reason, **data},
        schema=stage_schema(columns),
    )


def failed(error: BaseException) -> NotOk:
    """A row whose work raised: `<error class>: <first line>`, at most 200 characters."""
    text = re.sub(r" at 0x[0-9a-f]+", "", (str(error).splitlines() or [""])[0])
    return NotOk("failed", f"{type(error).__name__}: {text}"[:200])
