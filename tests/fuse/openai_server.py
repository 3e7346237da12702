"""A small HTTP server that speaks the published chat-completions API over a real socket.

It checks requests as the API does (key, model, body: 401, 404, 400) and answers with a canned
caption. Faults are queued with `script`: each is used up by one request, in order of arrival.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

MODEL = "captioner-7b"
CAPTION = "A red barn stands left of a gravel road; a sign reads “Öl & Brot”."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["user", "assistant"]
    content: str | list[ImagePart | TextPart]

    @property
    def parts(self) -> list[ImagePart | TextPart]:
        assert isinstance(self.content, list)
        return self.content


class ChatRequest(_Strict):
    """The part of the published request schema that a caption needs; anything else is a 400."""

    model: str
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    @property
    def image_url(self) -> ImageUrl:
        (part,) = [p for p in self.messages[0].parts if isinstance(p, ImagePart)]
        return part.image_url

    @property
    def prompt(self) -> str:
        (part,) = [p for p in self.messages[0].parts if isinstance(p, TextPart)]
        return part.text


def completion(content: str | None = CAPTION, finish: str = "stop", **message: Any) -> bytes:
    """The body of a chat completion; `message` adds fields to the assistant's message."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None, **message},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": 1234, "completion_tokens": 56, "total_tokens": 1290},
    }
    return json.dumps(body).encode()


def error_body(message: str, code: str | None, param: str | None = None) -> bytes:
    """The body of an API error."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return json.dumps({"error": error}).encode()


@dataclass
class Reply:
    status: int = 200
    body: bytes = field(default_factory=completion)
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    """Silence before the status line."""
    cut_at: int | None = None
    """Close the connection after this many bytes of the body; Content-Length names all of it."""
    drip_s: float | None = None
    """Seconds between blanks sent, one by one, before the body (a keep-alive some servers use)."""


DROP = Reply(status=0)
"""Close the connection without an answer."""


@dataclass
class OpenAIServer:
    key: str | None
    """The only key that is let in; None lets in every request."""
    url: str = ""
    requests: list[ChatRequest] = field(default_factory=list)
    """Valid requests, in order of arrival."""
    arrivals: list[float] = field(default_factory=list)
    """Monotonic seconds at which each HTTP request came, valid or not."""
    authorizations: list[str | None] = field(default_factory=list)
    most_in_flight: int = 0
    always: Reply | None = None
    """Answer to every valid request once the script is used up."""
    _in_flight: int = 0
    _script: list[Reply] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def script(self, *replies: Reply) -> None:
        with self._lock:
            self._script.extend(replies)

    def answer(self, path: str, authorization: str | None, body: bytes) -> Reply:
        with self._lock:
            self.arrivals.append(time.monotonic())
            self.authorizations.append(authorization)
        if path != "/v1/chat/completions":
            return Reply(404, b'{"detail":"Not Found"}')
        if self.key is not None and authorization != f"Bearer {self.key}":
            # Careless gateways repeat the whole header.
            return Reply(401, error_body(f"Incorrect key: {authorization}", "invalid_api_key"))
        try:
            request = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            return Reply(400, error_body(str(error), None))
        if request.model != MODEL:
            text = f"The model `{request.model}` does not exist"
            return Reply(404, error_body(text, "model_not_found", "model"))
        with self._lock:
            self.requests.append(request)
            return self._script.pop(0) if self._script else self.always or Reply()

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1


def _handler(server: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with server.counted():
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply = server.answer(self.path, self.headers["Authorization"], body)
                try:
                    self._send(reply)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client gave up first, as some tests want

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.delay_s)
            if reply.status == 0:
                self.close_connection = True
                return
            blanks = 0 if reply.drip_s is None else 1000
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(blanks + len(reply.body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            for _ in range(blanks):
                self.wfile.write(b" ")
                time.sleep(reply.drip_s or 0)
            self.wfile.write(reply.body[: reply.cut_at])
            if reply.cut_at is not None:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass  # requests are recorded by the server object

    return Handler


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes a burst of connections wait a second


@contextmanager
def serve(key: str | None) -> Iterator[OpenAIServer]:
    """Serve on a free loopback port; `url` of the result is the API's base URL."""
    server = OpenAIServer(key)
    http = _Http(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    # A short poll: shutdown waits for it in every test.
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
