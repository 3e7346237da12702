"""Requests as lines of files, and files of as many whole lines as limits allow.

A line is what the published Batch API reads, and `vllm run-batch`, too.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from fusion_pipeline.dataset.images import DecodeError
from fusion_pipeline.fuse.base import CaptionFailed, CaptionOutcome, CaptionRequest
from fusion_pipeline.fuse.batch.books import Asked
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.completions import request_body
from fusion_pipeline.fuse.endpoint import TURN_TOKENS
from fusion_pipeline.fuse.journal import request_id

_AT_ONCE = 32
"""Requests that are encoded while one is packed: a line holds an image."""
_LINE = b'{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": '


def id_of(key: str, prompt: str, config: BatchConfig) -> str:
    """The same as an endpoint's request would have."""
    return request_id(key, (prompt,), config.fingerprint_fields())


def asked_of(request: CaptionRequest, config: BatchConfig, excess: int = 0) -> Asked:
    """`excess`: tokens that a prompt once counted beyond what was thought to be the most."""
    # A token is a byte of the prompt at least.
    tokens = len(request.prompt.encode()) + TURN_TOKENS + config.image_tokens + excess
    return Asked(id_of(request.key, request.prompt, config), request.shard, tokens)


def most_dollars(asked: Asked, config: BatchConfig) -> float:
    return config.cost(asked.tokens, config.max_tokens)


def line_of(request: CaptionRequest, asked: Asked, config: BatchConfig) -> bytes | CaptionFailed:
    """The line, its end included; or why there is none."""
    try:
        body = request_body(request, config)
    except DecodeError:
        return CaptionFailed("undecodable")
    line = _LINE % asked.id.encode() + body + b"}\n"  # the body is one line of JSON
    if len(line) > config.max_file_bytes:
        return CaptionFailed("request_too_large")
    return line


class FullError(Exception):
    """A limit that another file does not lift: money, or tokens of unfinished batches."""


@dataclass
class Limits:
    """What may still be sent."""

    dollars: float = math.inf
    tokens: float = math.inf


@dataclass
class Packer:
    """Collects lines, and hands on a file whenever one is full: `send(data, asked, most)`."""

    config: BatchConfig
    limits: Limits
    send: Callable[[bytes, list[Asked], float], object]
    files: int = 0
    requests: int = 0
    """Of those files."""
    _lines: list[bytes] = field(default_factory=list)
    _asked: list[Asked] = field(default_factory=list)
    _bytes: int = 0
    _dollars: float = 0.0
    _tokens: int = 0

    def add(self, line: bytes, asked: Asked) -> None:
        """Raises FullError, with the line not taken; what was taken before is to be flushed."""
        dollars = most_dollars(asked, self.config)
        if (
            self._dollars + dollars > self.limits.dollars
            or self._tokens + asked.tokens > self.limits.tokens
        ):
            raise FullError
        is_full = len(self._lines) == self.config.max_requests
        if is_full or self._bytes + len(line) > self.config.max_file_bytes:
            self.flush()
        self._lines.append(line)
        self._asked.append(asked)
        self._bytes += len(line)
        self._dollars += dollars
        self._tokens += asked.tokens

    def flush(self) -> None:
        if not self._lines:
            return
        data, asked, dollars = b"".join(self._lines), self._asked, self._dollars
        self.limits.dollars -= dollars
        self.limits.tokens -= self._tokens
        self._lines, self._asked = [], []  # the lines are not to be held twice while they are sent
        self._bytes = self._tokens = 0
        self._dollars = 0.0
        self.files += 1
        self.requests += len(asked)
        self.send(data, asked, dollars)

    def pack(
        self, requests: Iterable[CaptionRequest], wanted: set[str], excess: int, pool: Executor
    ) -> tuple[dict[Asked, CaptionOutcome], set[str]]:
        """Add the requests with the `wanted` ids. What can't be sent, and why; and what found no
        room: from the first such request on, all."""
        refused, left, waiting = dict[Asked, CaptionOutcome](), set(wanted), iter(requests)
        while some := list(islice(waiting, _AT_ONCE)):
            asked = [asked_of(request, self.config, excess) for request in some]
            lines = pool.map(partial(line_of, config=self.config), some, asked)
            for one, line in zip(asked, lines, strict=True):
                if isinstance(line, CaptionFailed):
                    refused[one] = line
                else:
                    try:
                        self.add(line, one)
                    except FullError:
                        return refused, left
                left.discard(one.id)
        return refused, set()
