"""A server of files and batches: it follows the published Batch API, and misbehaves on demand.

Batches are run when a test says so (`work`), and their result files may lack lines, hold them
twice, in another order or out of any form, and come late. Faults come by the draw of a hash of
request and sending: the same for each run.
"""

import contextlib
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from openai_server import MODEL, ChatRequest
from pydantic import BaseModel, ConfigDict, ValidationError

from tests.fuse.api_server import in_a_thread

INPUT_PRICE, OUTPUT_PRICE = 1.25, 5.0
"""Dollars per million tokens."""


class InputLine(BaseModel):
    """Of the published format of input files."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str
    method: str
    url: str
    body: ChatRequest


def caption_of(prompt: str) -> str:
    return f"A hand-painted sign that reads {prompt}."


def tokens_of(custom_id: str) -> tuple[int, int]:
    number = int(hashlib.sha256(custom_id.encode()).hexdigest()[:8], 16)
    return 500 + number % 400, 100 + number % 50


@dataclass
class Batch:
    id: str
    file: str
    metadata: dict[str, str]
    lines: list[InputLine]
    created_at: int
    status: str = "validating"
    output: str | None = None
    error: str | None = None
    code: str | None = None
    completed: int = 0
    failed: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])


@dataclass
class BatchServer:
    key: str | None = None
    faults: Mapping[str, float] = field(default_factory=dict)
    """Shares of requests, by fault: lost, doubled, http_500, http_429, http_400, blocked,
    unsupported, malformed, html, expired."""
    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    enqueued_tokens: int | None = None
    clock: Callable[[], float] = time.time
    shows_usage: bool = True
    mangled: Mapping[str, object] = field(default_factory=dict)
    """Fields of batches that are shown otherwise."""
    mangled_page: Mapping[str, object] = field(default_factory=dict)
    """Fields of lists that are shown otherwise."""
    refusals: dict[str, int] = field(default_factory=dict)
    """HTTP statuses, by the name of a handler or the id of a file."""
    code: str | None = None
    """With which all batches are refused as a whole."""
    answers_creation: Callable[[], int] = lambda: 200
    """The HTTP status with which the making of a batch is answered, after it was made."""
    lag_s: float = 0.0
    """After which a new batch is listed."""
    is_late: bool = False
    """Result files hold the first half of their lines; the rest after the next `work`."""
    url: str = ""
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Name and content by id."""
    batches: list[Batch] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """How often a request was in a batch that was accepted, by custom_id."""
    worked: Counter[str] = field(default_factory=Counter)
    """How often it was run."""
    bill: float = 0.0
    uploads: int = 0
    uploaded: list[bytes] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What an input file did wrong."""
    _late: dict[str, bytes] = field(default_factory=dict)
    _count: int = 0

    # Files

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form["file"]
        assert isinstance(file, web.FileField)
        assert form["purpose"] == "batch"
        self.uploads += 1
        data = file.file.read()
        self.uploaded.append(data)
        return web.json_response(self._file(self._put(file.filename, data)))

    async def list_files(self, request: web.Request) -> web.Response:
        return self._page(request, [self._file(name) for name in reversed(self.files)])

    async def content(self, request: web.Request) -> web.StreamResponse:
        found = self.files.get(request.match_info["id"])
        return web.Response(body=found[1]) if found else _error(404, "not_found")

    async def delete_file(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if self.files.pop(name, None) is None:
            return _error(404, "not_found")
        return web.json_response({"id": name, "object": "file", "deleted": True})

    def _put(self, filename: str, data: bytes) -> str:
        name = self._new("file")
        self.files[name] = (filename, data)
        return name

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._count:06d}"

    def _file(self, name: str) -> dict[str, Any]:
        filename, data = self.files[name]
        facts = {"bytes": len(data), "created_at": int(self.clock()), "filename": filename}
        return {"id": name, "object": "file", "purpose": "batch", "status": "processed", **facts}

    # Batches

    async def create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        found = self.files.get(asked["input_file_id"])
        if found is None or asked["endpoint"] != "/v1/chat/completions":
            return _error(400, "invalid_request")
        assert asked["completion_window"] == "24h"
        lines, code = self._validated(found[1])
        name = self._new("batch")
        batch = Batch(name, asked["input_file_id"], asked["metadata"], lines, int(self.clock()))
        if code is not None:
            batch.status, batch.code = "failed", code
        else:
            self.sent.update(line.custom_id for line in lines)
        self.batches.append(batch)
        status = self.answers_creation()
        return web.json_response(self._shown(batch)) if status == 200 else _error(status, "gateway")

    def _validated(self, data: bytes) -> tuple[list[InputLine], str | None]:
        lines = []
        for text in data.splitlines():
            try:
                lines.append(InputLine.model_validate_json(text))
            except ValidationError as error:
                self.problems.append(str(error))
                return [], "invalid_json_line"
        if self.code is not None:
            return [], self.code
        if len({line.custom_id for line in lines}) < len(lines):
            return [], "duplicate_custom_id"
        if len(lines) > self.max_requests or len(data) > self.max_bytes:
            self.problems.append(f"{len(lines)} requests, {len(data)} bytes")
            return [], "too_large"
        if self.enqueued_tokens is not None:
            waiting = [line for batch in self.batches if _is_open(batch) for line in batch.lines]
            total = sum(tokens_of(line.custom_id)[0] for line in waiting + lines)
            if total > self.enqueued_tokens:
                return [], "token_limit_exceeded"
        return lines, None

    async def list_batches(self, request: web.Request) -> web.Response:
        there = [b for b in self.batches if self.clock() - b.created_at >= self.lag_s]
        return self._page(request, [self._shown(batch) for batch in reversed(there)])

    async def retrieve(self, request: web.Request) -> web.Response:
        batch = self._find(request)
        return web.json_response(self._shown(batch)) if batch else _error(404, "not_found")

    async def cancel(self, request: web.Request) -> web.Response:
        batch = self._find(request)
        if batch is None or not _is_open(batch):
            return _error(409, "conflict")
        batch.status = "cancelling"
        return web.json_response(self._shown(batch))

    def _find(self, request: web.Request) -> Batch | None:
        wanted = request.match_info["id"]
        return next((batch for batch in self.batches if batch.id == wanted), None)

    def _page(self, request: web.Request, items: list[dict[str, Any]]) -> web.Response:
        after, limit = request.query.get("after"), int(request.query.get("limit", "20"))
        names = [item["id"] for item in items]
        start = names.index(after) + 1 if after else 0
        page = items[start : start + limit]
        more = start + limit < len(items)
        shown = {"object": "list", "data": page, "has_more": more, **self.mangled_page}
        return web.json_response(shown)

    def _shown(self, batch: Batch) -> dict[str, Any]:
        ended = None if _is_open(batch) else int(self.clock())
        problem = {"code": batch.code, "message": f"no: {self.key}", "line": None}
        usage = {"input_tokens": batch.tokens[0], "output_tokens": batch.tokens[1]}
        usage["total_tokens"] = sum(batch.tokens)
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "input_file_id": batch.file,
            "status": batch.status,
            "created_at": batch.created_at,
            "output_file_id": batch.output,
            "error_file_id": batch.error,
            "errors": {"object": "list", "data": [problem]} if batch.code else None,
            "metadata": batch.metadata,
            "request_counts": {
                "total": len(batch.lines),
                "completed": batch.completed,
                "failed": batch.failed,
            },
            "usage": usage if self.shows_usage and not _is_open(batch) else None,
            **({f"{batch.status}_at": ended} if ended else {}),
            **self.mangled,
        }

    # Work

    def work(self) -> None:
        """Late results come in; all batches are brought to their end."""
        for name, data in self._late.items():
            self.files[name] = (self.files[name][0], data)
        self._late.clear()
        for batch in filter(_is_open, self.batches):
            self._run(batch)

    def _run(self, batch: Batch) -> None:
        answers: list[bytes] = []
        errors: list[bytes] = []
        if batch.status == "cancelling":  # half of it was done by then
            runs, batch.status = batch.lines[: len(batch.lines) // 2], "cancelled"
            errors += [_line(line, "batch_cancelled") for line in batch.lines[len(runs) :]]
        else:
            runs, batch.status = batch.lines, "completed"
        for line in runs:
            self.worked[line.custom_id] += 1
            self._answer(batch, line, answers, errors)
        if any(b"batch_expired" in error for error in errors):
            batch.status = "expired"
        random.Random(batch.id).shuffle(answers)
        batch.output, batch.error = self._results(answers), self._results(errors)

    def _results(self, lines: list[bytes]) -> str | None:
        if not lines:
            return None
        whole = b"\n".join(lines) + b"\n"
        name = self._put("results.jsonl", whole)
        if self.is_late:
            self._late[name] = whole
            self.files[name] = ("results.jsonl", b"\n".join(lines[: len(lines) // 2]))
        return name

    def _answer(
        self, batch: Batch, line: InputLine, answers: list[bytes], errors: list[bytes]
    ) -> None:
        fault = self._draw(f"{line.custom_id} {self.sent[line.custom_id]}")
        prompt, completion = tokens_of(line.custom_id)
        if fault == "expired":
            errors.append(_line(line, "batch_expired"))
            batch.failed += 1
            return
        if fault in ("http_500", "http_429", "http_400", "unsupported"):
            code = "unsupported_parameter" if fault == "unsupported" else None
            errors.append(_line(line, code, status=400 if code else int(fault[-3:])))
            batch.failed += 1
            return
        times = 2 if fault == "doubled" else 1
        batch.tokens[0] += times * prompt
        batch.tokens[1] += times * completion
        self.bill += times * (INPUT_PRICE * prompt + OUTPUT_PRICE * completion) / 1e6
        batch.completed += 1
        if fault == "lost":
            return
        if fault == "malformed":
            answers.append(_line(line)[:40])
        elif fault == "html":
            body = b'"<html>Bad gateway, but with status 200</html>"'
            answers.append(
                _line(line)[: _line(line).index(b'"body": ')] + b'"body": ' + body + b"}}"
            )
        else:
            answers += times * [
                _line(line, finish="content_filter" if fault == "blocked" else "stop")
            ]

    def _draw(self, text: str) -> str:
        lot = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        for kind, share in self.faults.items():
            lot -= share
            if lot < 0:
                return kind
        return ""


def _is_open(batch: Batch) -> bool:
    return batch.status in ("validating", "in_progress", "finalizing", "cancelling")


def _line(
    line: InputLine, code: str | None = None, status: int = 200, finish: str = "stop"
) -> bytes:
    """Of a result file."""
    prompt, completion = tokens_of(line.custom_id)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    content = None if finish == "content_filter" else caption_of(line.body.prompt)
    message = {"role": "assistant", "content": content, "refusal": None}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {**usage, "total_tokens": prompt + completion},
    }
    if status != 200:
        body = {"error": {"message": "no", "type": "error", "param": None, "code": code}}
        code = None
    response = {"status_code": status, "request_id": "r", "body": body}
    return json.dumps(
        {
            "id": "batch_req_1",
            "custom_id": line.custom_id,
            "error": {"code": code, "message": "no"} if code else None,
            "response": None if code else response,
        }
    ).encode()


def _error(status: int, code: str) -> web.Response:
    error = {"message": "no", "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status)


@contextlib.contextmanager
def serve_batches(server: BatchServer) -> Iterator[BatchServer]:
    """On a free loopback port; `url` is then the API's base URL."""
    with in_a_thread(lambda: _listen(server)):
        yield server


async def _listen(server: BatchServer) -> web.AppRunner:
    @web.middleware
    async def let_in(request: web.Request, handler: Any) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        if server.key is not None and authorization != f"Bearer {server.key}":
            error = {"message": f"Incorrect key: {authorization}", "code": "invalid_api_key"}
            return web.json_response({"error": error}, status=401)
        names = request.match_info.handler.__name__, request.match_info.get("id", "")
        for name in names:
            if name in server.refusals:
                refusal = _error(server.refusals[name], "no")
                refusal.headers["x-should-retry"] = "false"
                return refusal
        answer: web.StreamResponse = await handler(request)
        return answer

    app = web.Application(client_max_size=256 * 2**20, middlewares=[let_in])
    app.router.add_post("/v1/files", server.upload)
    app.router.add_get("/v1/files", server.list_files)
    app.router.add_delete("/v1/files/{id}", server.delete_file)
    app.router.add_get("/v1/files/{id}/content", server.content)
    app.router.add_post("/v1/batches", server.create)
    app.router.add_get("/v1/batches", server.list_batches)
    app.router.add_get("/v1/batches/{id}", server.retrieve)
    app.router.add_post("/v1/batches/{id}/cancel", server.cancel)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    return runner
