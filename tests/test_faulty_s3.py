"""The misbehaving S3 server keeps its promises: tests against it mean what they say."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

pytest.importorskip("s3fs")

from fusion_pipeline.dataset.storage import Storage
from tests.faulty_s3 import KINDS, Kind, S3Server, s3_server
from tests.killing import REPOSITORY

BUCKET = "fusion-test"
ONE_ATTEMPT = Config(retries={"total_max_attempts": 1})


@pytest.fixture(scope="module")
def shared() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        # moto then writes each body to a file, and other threads run between the check and the
        # write of a conditional put: without the server's lock many of them win.
        patch.setenv("MOTO_S3_DEFAULT_KEY_BUFFER_SIZE", "1")
        with s3_server() as server:
            server.make_bucket(BUCKET)
            yield server


@pytest.fixture
def server(shared: S3Server) -> Iterator[S3Server]:
    yield shared
    shared.behave()


def met(server: S3Server, before: dict[str, int]) -> dict[str, int]:
    """The faults met since `before`."""
    after = server.counts()
    return {name: after[name] - before[name] for name in after if after[name] > before[name]}


def code_of(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


@pytest.mark.parametrize(
    ("kind", "error", "code", "written"),
    [
        ("internal_error", ClientError, "InternalError", False),
        ("slow_down", ClientError, "SlowDown", False),
        ("reset", ConnectionClosedError, None, False),
        ("lost_answer", ConnectionClosedError, None, True),
        ("delay", ReadTimeoutError, None, True),
    ],
)
def test_a_fault_and_what_is_stored_after_it(
    server: S3Server, kind: Kind, error: type[Exception], code: str | None, written: bool
) -> None:
    client = server.client(ONE_ATTEMPT.merge(Config(read_timeout=0.5)))
    for size in (0, 10, 5_000_000):
        name = f"{kind}-{size}"
        before = server.counts()
        # Of this seed, the first delay is longer than the client's patience.
        server.misbehave(rate=1, seed=5, max_delay=2, kinds=[kind])
        with pytest.raises(error) as caught:
            client.put_object(Bucket=BUCKET, Key=name, Body=bytes(size))
        assert met(server, before) == {"requests": 1, kind: 1}
        assert code is None or code_of(caught.value) == code
        server.behave()
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=name).get("Contents", [])
        assert [item["Size"] for item in found] == ([size] if written else [])


def test_on_the_wire(server: S3Server) -> None:
    def ask() -> bytes:
        host, port = server.endpoint.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"HEAD /{BUCKET} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return connection.recv(12)

    assert ask() == b"HTTP/1.1 200"
    server.misbehave(rate=1, kinds=["slow_down"])
    assert ask() == b"HTTP/1.1 503"
    server.misbehave(rate=1, kinds=["lost_answer"])
    assert ask() == b""
    server.misbehave(rate=1, kinds=["reset"])
    with pytest.raises(ConnectionResetError):
        ask()
    server.outage()
    with pytest.raises(ConnectionResetError):
        ask()


def test_a_delay_is_only_a_delay(server: S3Server) -> None:
    client = server.client(ONE_ATTEMPT)
    server.misbehave(rate=1, max_delay=0.4, kinds=["delay"])
    seconds = []
    for _ in range(8):
        start = time.monotonic()
        client.put_object(Bucket=BUCKET, Key="late", Body=b"")
        seconds.append(time.monotonic() - start)
    assert max(seconds) > 0.2
    assert min(seconds) < 0.2
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:  # others don't wait for the one that is delayed
        list(pool.map(lambda _: client.head_object(Bucket=BUCKET, Key="late"), range(8)))
    assert time.monotonic() - start < 0.75 * sum(seconds)


def test_rate_and_seed(server: S3Server) -> None:
    def statuses(seed: int) -> list[str]:
        server.misbehave(rate=0.2, seed=seed, kinds=["internal_error", "slow_down"])
        client = server.client(ONE_ATTEMPT)
        answers = []
        for _ in range(200):
            try:
                client.get_bucket_location(Bucket=BUCKET)
                answers.append("")
            except ClientError as error:
                answers.append(code_of(error))
        return answers

    before = server.counts()
    first = statuses(seed=1)
    assert first == statuses(seed=1) != statuses(seed=2)
    assert {"InternalError", "SlowDown"} < set(first)
    assert 20 < len([code for code in first if code]) < 60
    assert 60 < sum(met(server, before).values()) - 600 < 180
    server.behave()
    before = server.counts()
    server.client(ONE_ATTEMPT).list_buckets()
    assert met(server, before) == {"requests": 1}


def test_an_outage_lasts_until_told_otherwise(server: S3Server) -> None:
    client = server.client(ONE_ATTEMPT)
    server.outage()
    before = server.counts()
    for _ in range(20):
        with pytest.raises(ConnectionClosedError):
            client.list_buckets()
    assert met(server, before) == {"requests": 20, "outage": 20}
    server.behave()
    assert client.list_buckets()["Buckets"]


@pytest.mark.parametrize("condition", ["new", "unchanged"])
def test_one_of_many_conditional_puts_wins(server: S3Server, condition: str) -> None:
    callers, rounds, size = 20, 20, 100_000
    client = server.client(Config(max_pool_connections=callers))
    barrier = threading.Barrier(callers)

    def put(key: str, mine: int, **given: str) -> str:
        barrier.wait()
        try:
            client.put_object(Bucket=BUCKET, Key=key, Body=bytes([mine]) * size, **given)
        except ClientError as error:
            return code_of(error)
        return "won"

    with ThreadPoolExecutor(callers) as pool:
        for i in range(rounds):
            key = f"{condition}-{i}"
            given = {"IfNoneMatch": "*"}
            if condition == "unchanged":
                answer = client.put_object(Bucket=BUCKET, Key=key, Body=b"before")
                given = {"IfMatch": answer["ETag"]}
            futures = [pool.submit(put, key, mine, **given) for mine in range(callers)]
            outcomes = [future.result() for future in futures]
            assert sorted(outcomes) == ["PreconditionFailed"] * (callers - 1) + ["won"]
            stored = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            assert stored == bytes([outcomes.index("won")]) * size


def test_a_lost_answer_makes_a_winner_think_it_lost(server: S3Server) -> None:
    client = server.client(Config(retries={"total_max_attempts": 2}))
    server.misbehave(rate=0.5, seed=4, kinds=["lost_answer"])  # the first, not the second
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=BUCKET, Key="mine", Body=b"mine", IfNoneMatch="*")
    server.behave()
    assert client.get_object(Bucket=BUCKET, Key="mine")["Body"].read() == b"mine"


def test_the_storage_layer_lives_through_faults(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    storage = Storage(f"s3://{BUCKET}/storage")
    before = server.counts()
    server.misbehave(rate=0.2, seed=3, max_delay=0.1)
    for i in range(40):
        storage.put(f"file-{i:02}", bytes([i]))
    assert [storage.read(f"file-{i:02}") for i in range(40)] == [bytes([i]) for i in range(40)]
    assert storage.exists("file-00")
    assert storage.files("") == [f"file-{i:02}" for i in range(40)]
    assert set(met(server, before)) == {"requests", *KINDS}
    fsspec.filesystem("s3").clear_instance_cache()


def test_it_ends_with_the_process_that_started_it() -> None:
    script = (
        "import time\nfrom tests.faulty_s3 import s3_server\n"
        "with s3_server() as server:\n    print(server.endpoint, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        assert S3Server(starter.stdout.readline().strip()).counts()["requests"] == 0
        servers = psutil.Process(starter.pid).children()
        assert len(servers) == 1
        starter.kill()
    _, alive = psutil.wait_procs(servers, timeout=20)
    assert not alive
