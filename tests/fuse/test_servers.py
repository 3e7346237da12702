"""Servers are started, watched, started again and ended; no model is needed for that."""

import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fusion_pipeline.fuse.servers import (
    LocalServers,
    Server,
    ServerCommand,
    ServerError,
    ServerState,
    first_healthy,
)

HEALTHY = """
    import os, signal, subprocess, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    # An engine process that nobody ends with the server, as vLLM's.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    port = int(sys.argv[sys.argv.index("--port") + 1])

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(os.environ.get("CUDA_VISIBLE_DEVICES", "").encode())

        def log_message(self, *_):
            pass

    HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
BROKEN = """
    print("[red]no such model[/]")
    raise SystemExit(3)
"""


def command(tmp_path: Path, script: str) -> ServerCommand:
    place = tmp_path / "serve.py"
    place.write_text(textwrap.dedent(script))
    return ServerCommand((sys.executable, str(place)), startup_s=60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(command(tmp_path, HEALTHY))
    yield running
    running.stop()


def processes_of(tmp_path: Path) -> list[psutil.Process]:
    """Keeper, server, and what the server started."""
    keepers = [
        process
        for process in psutil.Process().children()
        if "keeper.py" in " ".join(process.cmdline()) and str(tmp_path) in str(process.cmdline())
    ]
    return [p for keeper in keepers for p in (keeper, *keeper.children(recursive=True))]


def wait_until_healthy(server: Server, deaths: int = 0) -> ServerState:
    deadline = time.monotonic() + 60
    while (state := server.state()).url is None or state.deaths < deaths:
        assert state.error is None, state.error
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return state


def test_a_dead_server_is_started_again_and_leaves_nothing_behind(
    server: Server, tmp_path: Path
) -> None:
    first = wait_until_healthy(server)
    assert first.url is not None
    assert first.url.startswith("http://127.0.0.1:")
    _, killed, engine = processes_of(tmp_path)
    killed.kill()
    again = wait_until_healthy(server, deaths=1)
    assert again.deaths == 1
    assert not engine.is_running(), "it would hold the memory of the GPU"


def test_a_killed_keeper_takes_its_server_with_it(server: Server, tmp_path: Path) -> None:
    wait_until_healthy(server)
    keeper, killed, _ = processes_of(tmp_path)
    keeper.kill()
    psutil.wait_procs([killed], timeout=30)
    assert not killed.is_running()
    wait_until_healthy(server, deaths=1)


def test_the_end_is_the_end(server: Server, tmp_path: Path) -> None:
    wait_until_healthy(server)
    running = processes_of(tmp_path)
    assert len(running) == 3
    server.stop()
    assert not any(process.is_running() for process in running)


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    servers = LocalServers(command(tmp_path, BROKEN), count=1, gpus=0)
    with pytest.raises(ServerError, match="did not come up") as caught:
        first_healthy(servers)
    assert "[red]no such model[/]" in str(caught.value), "the end of its log"


def test_each_server_gets_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    with pytest.raises(ServerError, match="may use 4"):
        LocalServers(command(tmp_path, HEALTHY), count=3, gpus=2)
    servers = LocalServers(command(tmp_path, HEALTHY), count=2, gpus=2)
    try:
        first_healthy(servers)
        seen = {
            process.environ().get("CUDA_VISIBLE_DEVICES")
            for process in processes_of(tmp_path)
            if "keeper.py" in " ".join(process.cmdline())
        }
    finally:
        servers.stop()
    assert seen == {"4,5", "6,7"}
