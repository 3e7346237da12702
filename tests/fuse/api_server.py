"""A fast chat-completions server for loads: it follows the published API, and misbehaves on demand.

python tests/fuse/api_server.py PORT_FILE [--latency SECONDS]     answers until it is killed

Each request carries the sample's name in its prompt (`sample 17`), and is counted under it. Faults
come by the draw of a hash of name and attempt: the same for each run, whatever the order.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

MODEL = "captioner-7b"
PROMPT_TOKENS = 1000
COMPLETION_TOKENS = 200

FAULTS = {"429": 0.20, "500": 0.05, "hang": 0.05, "truncated": 0.02, "html": 0.01}
"""Shares of all requests."""


def caption_of(sample: str) -> str:
    return f"A hand-painted sign that reads {sample}."


@dataclass
class ApiServer:
    faults: Mapping[str, float] = field(default_factory=dict)
    latency_s: float = 0.0
    per_second: float | None = None
    """Requests that are let in, on average; others get a 429, which does not count as a fault."""
    url: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by sample."""
    charged: Counter[str] = field(default_factory=Counter)
    """Those that a provider would put on the bill: all that an answer was made for."""
    given: Counter[str] = field(default_factory=Counter)
    """By kind of answer."""
    in_flight: int = 0
    most_in_flight: int = 0
    _room: float = 0.0
    _filled: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> tuple[int, int]:
        """Of prompts and answers, on the bill."""
        count = self.charged.total()
        return count * PROMPT_TOKENS, count * COMPLETION_TOKENS

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        sample = re.findall(rb"sample \d+", body[-4000:])[-1].decode()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, sample)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, sample: str) -> web.StreamResponse:
        if not self._is_let_in():
            self.given["over the limit"] += 1
            return _error(429, "rate_limit_exceeded", {"Retry-After": "0.05"})
        self.seen[sample] += 1
        kind = self._draw(sample)
        self.given[kind] += 1
        if kind == "429":
            return _error(429, "rate_limit_exceeded", {"Retry-After": "0.02"})
        if kind == "500":
            return _error(500, "server_error")
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if kind == "html":
            return web.Response(text="<html>Bad gateway, but with status 200</html>")
        self.charged[sample] += 1
        if kind == "hang":
            await asyncio.sleep(3600)
        data = json.dumps(_completion(sample)).encode()
        if kind == "truncated":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(data)
            await response.prepare(request)
            await response.write(data[:40])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=data, content_type="application/json")

    def _is_let_in(self) -> bool:
        """A bucket of tokens that holds those of four seconds."""
        if self.per_second is None:
            return True
        now = time.monotonic()
        room = self._room + (now - self._filled) * self.per_second
        self._filled, self._room = now, min(room, 4 * self.per_second)
        if self._room < 1:
            return False
        self._room -= 1
        return True

    def _draw(self, sample: str) -> str:
        text = f"{sample} {self.seen[sample]}".encode()
        lot = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") / 2**32
        for kind, share in self.faults.items():
            lot -= share
            if lot < 0:
                return kind
        return "caption"


def _completion(sample: str) -> dict[str, object]:
    message = {"role": "assistant", "content": caption_of(sample), "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        },
    }


def _error(status: int, code: str, headers: Mapping[str, str] | None = None) -> web.Response:
    error = {"message": "no", "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


@contextlib.contextmanager
def in_a_thread(listen: Callable[[], Awaitable[web.AppRunner]]) -> Iterator[None]:
    """What listens does so in a thread and an event loop of its own."""
    ready: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def run() -> None:
        runner, stop = await listen(), asyncio.Event()
        ready.put((asyncio.get_running_loop(), stop))
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    loop, stop = ready.get()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)


@contextlib.contextmanager
def serve_api(server: ApiServer) -> Iterator[ApiServer]:
    """On a free loopback port; `url` is then the API's base URL."""
    with in_a_thread(lambda: _listen(server)):
        yield server


async def _listen(server: ApiServer) -> web.AppRunner:
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    return runner


async def _serve_alone(server: ApiServer, port_file: Path) -> None:
    await _listen(server)
    port_file.write_text(server.url)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port_file", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    asyncio.run(_serve_alone(ApiServer(latency_s=options.latency), options.port_file))
