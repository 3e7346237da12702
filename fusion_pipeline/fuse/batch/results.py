"""Result files of batches, read line by line: whatever is in them, each request gets at most one
outcome, and what was answered is charged."""

import io
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json

from fusion_pipeline.fuse.base import Captioned, CaptionFailed, CaptionOutcome, Finish
from fusion_pipeline.fuse.batch.books import Asked
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.files import most_dollars
from fusion_pipeline.fuse.completions import Completion
from fusion_pipeline.fuse.endpoint import AGAIN, BLOCKED_CODES

MAX_LINE = 2**20
"""Bytes. An answer is some kilobytes; a longer line is none."""
MAX_FILE = 2**31
"""Bytes of results that are read of one file."""
CONFIG_CODES = {
    "unsupported_parameter": "set `token_parameter: max_completion_tokens`, `temperature: null` or "
    "`seed: null`, or leave out `detail` and `extra_body`",
    "unsupported_value": "change `temperature`, `max_tokens`, `detail` or `extra_body`",
    "unknown_parameter": "change `extra_body`",
    "model_not_found": "check `model`",
    "http_401": "check the account's access to `model`",
    "http_403": "check the account's access to `model`",
    "http_404": "check `model`",
}
"""Why single requests fail that others would, too, and what is to be changed."""
_NOT_TRIED = ("batch_expired", "batch_cancelled")
"""Codes of requests that the provider never came to."""


def lines_in(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of a file, without their ends and empty ones; None for one that is too long, and
    for the rest of a file that is."""
    kept, is_long, total = io.BytesIO(), False, 0
    for chunk in chunks:
        total += len(chunk)
        if total > MAX_FILE:
            yield None
            return
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            kept.write(part)
            line = kept.getvalue()
            kept = io.BytesIO()
            if is_long or len(line) > MAX_LINE:
                yield None
            elif line.strip():
                yield line
            is_long = False
        if kept.tell() + len(rest) > MAX_LINE:
            kept, is_long = io.BytesIO(), True
        if not is_long:
            kept.write(rest)
    if is_long:
        yield None
    elif kept.getvalue().strip():
        yield kept.getvalue()


class _Response(BaseModel):
    status_code: int = Field(ge=100, le=599)
    body: Any = None


class _Line(BaseModel):
    custom_id: str = Field(max_length=512)
    response: _Response | None = None
    error: Any = None


@dataclass(frozen=True)
class _Answer:
    outcome: CaptionOutcome | None
    """None: the request is to be sent again, if it may be."""
    reason: str = ""
    """In that case, why."""
    tokens: tuple[int, int] | None = None
    """Of prompt and answer, when the line says so."""
    is_charged: bool = False
    """Whether it may have cost something."""
    is_made: bool = False
    """Whether the provider counts it as completed."""
    problem: str = ""
    """One of `CONFIG_CODES`."""


@dataclass
class Results:
    """What the result files of one batch say, line by line (`add`)."""

    asked: Mapping[str, Asked]
    """By id."""
    config: BatchConfig
    known: Container[str] = ()
    """Those that were answered, and paid, before."""
    outcomes: dict[str, CaptionOutcome] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)
    """Reasons of requests without an outcome, by id."""
    counts: Counter[str] = field(default_factory=Counter)
    dollars: float = 0.0
    """That the lines' usage amounts to."""
    unknown_dollars: float = 0.0
    """The most that answers without usage can have cost."""
    excess: int = 0
    made: set[str] = field(default_factory=set)
    """Requests of which a line has status 200."""

    def add(self, data: bytes | None) -> None:
        line = _parse(data)
        if line is None:
            self.counts["malformed"] += 1
            return
        asked = self.asked.get(line.custom_id)
        if asked is None:
            self.counts["unknown"] += 1
            return
        if asked.id in self.known:
            self.counts["doubled"] += 1
            return
        answer = _read(line)
        self._charge(asked, answer)
        if answer.is_made:
            self.made.add(asked.id)
        if asked.id in self.outcomes or (answer.outcome is None and asked.id in self.again):
            self.counts["doubled"] += 1
        elif answer.outcome is None:
            self.again[asked.id] = answer.reason
        else:  # an answer counts more than word that there is none
            self.again.pop(asked.id, None)
            self.outcomes[asked.id] = answer.outcome
            if answer.problem:
                self.counts[answer.problem] += 1

    def _charge(self, asked: Asked, answer: _Answer) -> None:
        if answer.tokens is not None:
            self.dollars += self.config.cost(*answer.tokens)
            self.excess = max(self.excess, answer.tokens[0] - asked.tokens)
        elif answer.is_charged:
            self.unknown_dollars += most_dollars(asked, self.config)

    @property
    def seen(self) -> int:
        """Requests of which there is word. A line that can't be read is none: a page of a proxy
        with status 200 is made of such."""
        return len(self.outcomes) + len(self.again)

    @property
    def missing(self) -> list[Asked]:
        return [
            asked
            for asked in self.asked.values()
            if asked.id not in self.outcomes and asked.id not in self.again
        ]

    def cost(self, billed: float | None, lost: int) -> float:
        """Dollars. `billed`: what the provider's own count of tokens amounts to, if it gives one;
        `lost`: answers that were made and did not come, which otherwise count in full."""
        if billed is not None:
            return max(billed, self.dollars)
        dearest = sorted((most_dollars(asked, self.config) for asked in self.missing), reverse=True)
        return self.dollars + self.unknown_dollars + sum(dearest[:lost])

    def tally(self) -> dict[str, int]:
        failed = sum(isinstance(outcome, CaptionFailed) for outcome in self.outcomes.values())
        counts = {
            "answered": len(self.outcomes) - failed,
            "failed": failed,
            "again": len(self.again),
            "missing": len(self.missing),
        }
        return {name: count for name, count in {**counts, **self.counts}.items() if count}


def _parse(data: bytes | None) -> _Line | None:
    if data is None:
        return None
    try:
        return _Line.model_validate_json(data)
    except ValidationError:
        return None


def _read(line: _Line) -> _Answer:
    if line.response is None:
        code = _code(line.error)
        if code in _NOT_TRIED:
            return _Answer(None, code)
        return _Answer(None, "batch_error")
    status, body = line.response.status_code, line.response.body
    completion = Completion.parse(to_json(body))
    tokens = None
    if completion is not None and completion.usage is not None:
        tokens = completion.usage.prompt_tokens, completion.usage.completion_tokens
    if status == 200:
        if completion is None:
            return _Answer(None, "bad_response", is_charged=True, is_made=True)
        return _Answer(completion.outcome(), tokens=tokens, is_charged=True, is_made=True)
    if status == 400 and completion is not None:
        # Azure's model inference reports filtered output as a completion with status 400.
        outcome = completion.outcome()
        if isinstance(outcome, Captioned) and outcome.finish is Finish.BLOCKED:
            return _Answer(outcome, tokens=tokens, is_charged=True)
    error = body.get("error") if isinstance(body, dict) else line.error
    if status == 400 and _code(error) in BLOCKED_CODES:
        # A prompt that the filter refused was read, and may be on the bill.
        return _Answer(Captioned(None, Finish.BLOCKED), is_charged=True)
    if status in AGAIN or status >= 500:
        return _Answer(None, f"http_{status}", tokens=tokens)
    problem = next((code for code in (_code(error), f"http_{status}") if code in CONFIG_CODES), "")
    return _Answer(CaptionFailed(f"http_{status}"), tokens=tokens, problem=problem)


def _code(error: object) -> str:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""
