"""A planted key is nowhere to be found after a run on a cluster, not on Ray's pages either."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx2
import psutil
import pytest

from tests.fuse.openai_server import CAPTION, MODEL, serve
from tests.jobs import QUICKSTART, make_photos
from tests.killing import finish, start

KEY = "sk-planted-5a1c7e9b3d2f"
PAGES = (
    "api/jobs/",
    "api/v0/actors?detail=true",
    "api/v0/tasks?detail=true",
    "api/v0/workers?detail=true",
    "api/v0/nodes?detail=true",
    "api/v0/runtime_envs?detail=true",
    "nodes?view=summary",
)
"""Of the dashboard: all that Ray knows of jobs, actors, tasks and environments."""


def a_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@dataclass(frozen=True)
class Cluster:
    folder: Path
    """All that Ray writes."""
    address: str
    pages: str
    token: str


def page_of(cluster: Cluster, page: str) -> httpx2.Response:
    login = {"Authorization": f"Bearer {cluster.token}"}
    return httpx2.get(f"{cluster.pages}/{page}", headers=login, timeout=30)


def is_up(cluster: Cluster) -> bool:
    try:
        return '"ALIVE"' in page_of(cluster, "api/v0/nodes?detail=true").text
    except httpx2.HTTPError:  # not yet
        return False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    found = Cluster(folder, f"127.0.0.1:{a_port()}", f"http://127.0.0.1:{a_port()}", "t" * 40)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", found.token)
    monkeypatch.setenv("CAPTION_KEY", KEY)  # a node's workers have the environment of the node
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=true"]
    command += [f"--port={found.address.split(':')[1]}"]
    command += [f"--dashboard-port={found.pages.rsplit(':')[-1]}"]
    with (folder / "output").open("wb") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not is_up(found):
            assert head.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield found
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        for process in (psutil.Process(head.pid), *family):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with another one
                process.kill()
        head.wait()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_a_planted_key(cluster: Cluster, tmp_path: Path) -> None:
    with serve(KEY) as server:
        endpoint = {"url": server.url, "model": MODEL, "key_env": "CAPTION_KEY"}
        settings = [
            f"run={tmp_path / 'run'}",
            "source.webdataset=null",
            f"source.folder={make_photos(tmp_path / 'photos', 6)}",
            "select.clusters=2",
            "experts=[efficientnet-lite2]",
            f"caption.engine={json.dumps({'endpoint': endpoint})}",
            f"runner.ray_address={cluster.address}",
        ]
        said = finish(start(["-m", "fusion_pipeline", "run", str(QUICKSTART), *settings]))
        assert server.requests, "the key was never used"
    assert CAPTION in (tmp_path / "run" / "export" / "llava.json").read_text()
    told = {"terminal": said}
    for page in PAGES:
        found = page_of(cluster, page)
        assert found.status_code == 200, f"{page}: {found.text[:500]}"
        told[page] = found.text
    assert "MapWorker" in told["api/v0/actors?detail=true"], "of another cluster"
    assert [page for page, text in told.items() if KEY in text or quote(KEY) in text] == []
    for folder in (tmp_path / "run", cluster.folder):
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        assert len(files) > 10
        assert [path for path in files if KEY.encode() in path.read_bytes()] == []
