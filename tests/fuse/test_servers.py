"""Servers are started, watched, started again and ended; no model is needed for that."""

import contextlib
import json
import subprocess
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
from tests.killing import REPOSITORY

HEALTHY = """
    import os, signal, subprocess, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    # An engine process that nobody ends with the server, as vLLM's.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    host = sys.argv[sys.argv.index("--host") + 1]
    port = int(sys.argv[sys.argv.index("--port") + 1])

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(os.environ.get("CUDA_VISIBLE_DEVICES", "").encode())

        def log_message(self, *_):
            pass

    HTTPServer((host, port), Answer).serve_forever()
"""
BROKEN = """
    print("[red]no such model[/]")
    raise SystemExit(3)
"""


def command(tmp_path: Path, script: str) -> ServerCommand:
    place = tmp_path / "serve.py"
    place.write_text(textwrap.dedent(script))
    return ServerCommand((sys.executable, str(place)), startup_s=60, pause_s=0.1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(command(tmp_path, HEALTHY))
    yield running
    running.stop()


def processes_of(tmp_path: Path) -> list[psutil.Process]:
    """Each keeper with its server, and what the server started."""
    keepers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "keeper.py" in " ".join(process.info["cmdline"] or ())
        and str(tmp_path) in str(process.info["cmdline"])
    ]
    found: list[psutil.Process] = []
    for keeper in keepers:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that forks itself away ends
            found += [keeper, *keeper.children(recursive=True)]
    return found


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


def test_its_death_is_known_before_its_last_process_is_gone(server: Server, tmp_path: Path) -> None:
    wait_until_healthy(server)
    _, killed, engine = processes_of(tmp_path)
    engine.suspend()  # as one that is busy giving memory back; SIGKILL ends it all the same
    killed.kill()
    deadline = time.monotonic() + 2
    while server.state().url is not None:
        assert time.monotonic() < deadline, "requests would go where nobody is"
        time.sleep(0.01)
    wait_until_healthy(server, deaths=1)
    assert not engine.is_running()


def test_a_killed_keeper_takes_its_server_with_it(server: Server, tmp_path: Path) -> None:
    wait_until_healthy(server)
    keeper, killed, engine = processes_of(tmp_path)
    keeper.kill()
    psutil.wait_procs([killed], timeout=30)
    assert not killed.is_running()
    wait_until_healthy(server, deaths=1)
    engine.kill()  # vLLM's own ends on the server's polite signal; nobody is left to end this one


def test_whoever_asked_for_it_is_killed(tmp_path: Path) -> None:
    """As Ray ends a worker: its children, too, and at once."""
    script = (
        "import time; from pathlib import Path; "
        "from tests.fuse.test_servers import HEALTHY, Server, command; "
        f"Server(command(Path({str(tmp_path)!r}), HEALTHY)); time.sleep(600)"
    )
    asker = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    asking, deadline = psutil.Process(asker.pid), time.monotonic() + 60
    # The keeper's first process leaves when it has forked; Ray would kill a child that stays.
    while len(family := processes_of(tmp_path)) != 3 or asking.children(recursive=True):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    asker.kill()
    asker.wait()
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive


def test_the_end_is_the_end(server: Server, tmp_path: Path) -> None:
    wait_until_healthy(server)
    running = processes_of(tmp_path)
    assert len(running) == 3
    server.stop()
    _, alive = psutil.wait_procs(running, timeout=5)  # the keeper's own last moment
    assert not alive


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    servers = LocalServers(command(tmp_path, BROKEN), count=1, gpus=0)
    with pytest.raises(ServerError, match="did not come up") as caught:
        first_healthy(servers, 60)
    assert "2 times in a row" in str(caught.value)
    assert "[red]no such model[/]" in str(caught.value), "the end of its log"


def test_each_server_gets_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ServerError, match="may use 0"):
        LocalServers(command(tmp_path, HEALTHY), count=1, gpus=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    with pytest.raises(ServerError, match="may use 4"):
        LocalServers(command(tmp_path, HEALTHY), count=3, gpus=2)
    servers = LocalServers(command(tmp_path, HEALTHY), count=2, gpus=2)
    try:
        first_healthy(servers, 60)
        seen = {
            process.environ().get("CUDA_VISIBLE_DEVICES")
            for process in processes_of(tmp_path)
            if "keeper.py" in " ".join(process.cmdline())
        }
    finally:
        servers.stop()
    assert seen == {"4,5", "6,7"}


SPREAD = """
import json, sys
from pathlib import Path
from fusion_pipeline.engine.ray_pool import RayOptions, start_ray, stop_ray
from fusion_pipeline.fuse.servers import ClusterServers, ServerError, first_healthy
from tests.fuse.test_servers import HEALTHY, command
start_ray(RayOptions(cpus=1))
servers = ClusterServers(command(Path(sys.argv[1]), HEALTHY), 2, 0)
first_healthy(servers, 60)
states = servers.states()
servers.stop()
starving = ClusterServers(command(Path(sys.argv[1]), HEALTHY), 1, 4)
try:
    first_healthy(starving, 5)
except ServerError as error:
    print(json.dumps([servers.key, [s.url for s in states], str(error)]))
stop_ray()
"""


@pytest.mark.xdist_group("ray")
def test_spread_over_a_cluster(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPREAD, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    key, urls, error = json.loads(done.stdout.splitlines()[-1])
    assert len(key) == 32
    assert len({url for url in urls if url}) >= 1
    assert "ray status" in error, "four GPUs were asked for, and none is there"
    _, alive = psutil.wait_procs(processes_of(tmp_path), timeout=40)
    assert not alive
