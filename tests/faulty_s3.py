"""An S3 server that can be told to misbehave, as a process of its own.

It is moto's server behind a layer that injects faults into a share of the requests. As a process of
its own it outlives a kill -9 of whatever uses it and does not compete for the user's interpreter.

    with s3_server() as server:
        server.make_bucket("bucket")
        server.misbehave(rate=0.1, seed=3)

By hand, `python -m tests.faulty_s3 --port 9000`, and `S3Server("http://127.0.0.1:9000").outage()`
from anywhere else.
"""

import argparse
import contextlib
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import boto3
from botocore.config import Config
from werkzeug.serving import make_server
from werkzeug.wrappers import Response
from werkzeug.wsgi import get_input_stream

Kind = Literal["internal_error", "slow_down", "reset", "lost_answer", "delay"]
KINDS: tuple[Kind, ...] = ("internal_error", "slow_down", "reset", "lost_answer", "delay")
"""500 or 503 instead of handling the request; the connection reset before handling it, or closed
after handling it but before the answer; the answer late."""

CONTROL = "/_faults"  # no bucket's name has an underscore


@dataclass(frozen=True)
class Behaviour:
    rate: float = 0.0
    seed: int = 0
    max_delay: float = 0.0
    kinds: Sequence[str] = KINDS
    outage: bool = False


@dataclass(frozen=True)
class S3Server:
    """A running server, as its users see it."""

    endpoint: str  # http://127.0.0.1:port

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead boto3 and s3fs to this server."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, config: Config | None = None) -> Any:
        """A boto3 client that needs none of these variables."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=config,
        )

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def misbehave(
        self,
        rate: float = 0.1,
        seed: int = 3,
        max_delay: float = 0.5,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        """From now on each request meets, with probability `rate`, one of `kinds`; ends an outage.

        One seed gives one sequence of faults; which request meets which depends on the order in
        which they come. `max_delay` is in seconds.
        """
        self._ask(Behaviour(rate, seed, max_delay, kinds))

    def behave(self) -> None:
        """No more faults, and the end of an outage."""
        self._ask(Behaviour())

    def outage(self) -> None:
        """Reset every connection until `behave` or `misbehave`."""
        self._ask(Behaviour(outage=True))

    def counts(self) -> dict[str, int]:
        """Since the start: "requests", and those that met a fault, by kind or "outage"."""
        return self._ask(None)

    def _ask(self, change: Behaviour | None) -> dict[str, int]:
        data = json.dumps(asdict(change)).encode() if change else None
        with urllib.request.urlopen(self.endpoint + CONTROL, data, timeout=30) as answer:
            counts: dict[str, int] = json.load(answer)
            return counts


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A well-behaved, empty server for the block; it ends with the caller's process, too."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faulty_s3", "--until-stdin-closes"],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            endpoint = process.stdout.readline().strip()
            if not endpoint:
                raise RuntimeError("The S3 server did not start; its error is on stderr.")
            yield S3Server(endpoint)
        finally:
            process.kill()


@dataclass
class FaultyApplication:
    """The layer in front of moto."""

    moto: WSGIApplication
    behaviour: Behaviour = field(default_factory=Behaviour)
    counts: Counter[str] = field(default_factory=Counter)
    dice: random.Random = field(default_factory=random.Random)
    dice_lock: threading.Lock = field(default_factory=threading.Lock)
    moto_lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == CONTROL:
            answer = self._control(get_input_stream(environ).read())
        else:
            answer = self._handle(environ)
        return answer(environ, start_response)

    def _handle(self, environ: WSGIEnvironment) -> Response:
        kind, delay = self._roll()
        if kind in ("reset", "outage"):
            hang_up(environ, reset=True)
        # Read before an early answer, or the sender would meet a closed connection instead of it;
        # and before the lock, or one slow sender would hold up all others.
        environ["wsgi.input"] = io.BytesIO(get_input_stream(environ).read())
        if kind == "internal_error":
            return refusal(500, "InternalError")
        if kind == "slow_down":
            return refusal(503, "SlowDown")
        # moto checks the condition of a conditional put and only then writes, and lists a bucket
        # while others may write to it: unlike S3's, its requests must come one at a time.
        with self.moto_lock:
            answer = Response.from_app(self.moto, environ, buffered=True)
        if kind == "lost_answer":
            hang_up(environ, reset=False)
        time.sleep(delay)
        return answer

    def _roll(self) -> tuple[str, float]:
        """The fault of the next request ("" is none) and its delay in seconds."""
        with self.dice_lock:
            now, kind = self.behaviour, ""
            if now.outage:
                kind = "outage"
            elif self.dice.random() < now.rate:
                kind = self.dice.choice(now.kinds)
            self.counts.update(["requests", kind] if kind else ["requests"])
            return kind, self.dice.uniform(0, now.max_delay) if kind == "delay" else 0.0

    def _control(self, data: bytes) -> Response:
        with self.dice_lock:
            if data:
                self.behaviour = Behaviour(**json.loads(data))
                self.dice.seed(self.behaviour.seed)
            counts = {name: self.counts[name] for name in ("requests", *KINDS, "outage")}
        return Response(json.dumps(counts), mimetype="application/json")


def refusal(status: int, code: str) -> Response:
    text = f"<Error><Code>{code}</Code><Message>An injected fault.</Message></Error>"
    return Response(text, status, mimetype="application/xml")


def hang_up(environ: WSGIEnvironment, reset: bool) -> None:
    """End the request and its connection without an answer, by RST or by FIN."""
    if reset:
        connection: socket.socket = environ["werkzeug.socket"]
        # With no time to linger, close sends RST. The detached descriptor is closed at once;
        # the socket itself would wait for the files made of it, and be shut down by FIN first.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())
    raise ConnectionAbortedError("an injected fault")  # as if the client had gone


def serve(port: int, until_stdin_closes: bool) -> None:
    # Here, because moto puts hooks into the botocore of a process that imports it.
    from moto.moto_server import werkzeug_app

    class Handler(werkzeug_app.MotoRequestHandler):
        def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
            self.close_connection = True  # it would wait for the connection's next request

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    moto = werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app)
    application = FaultyApplication(moto)
    server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    if until_stdin_closes:

        def wait() -> None:
            sys.stdin.read()
            server.shutdown()

        threading.Thread(target=wait, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--until-stdin-closes", action="store_true")
    arguments = parser.parse_args()
    serve(arguments.port, arguments.until_stdin_closes)
