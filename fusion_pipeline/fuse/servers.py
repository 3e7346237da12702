"""Keeps `vllm serve` processes up: starts, watches, starts again, ends them."""

import contextlib
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import httpx2

from fusion_pipeline.errors import FusionError, printable
from fusion_pipeline.fuse import keeper

LOOPBACK = "127.0.0.1"
_LOOK_S = 0.2
_HEALTH_EVERY_S = 10.0
_HEALTH_TIMEOUT_S = 30.0
_MOST_SILENCES = 3
"""Health checks in a row without an answer, after which a server is taken to hang."""
_MOST_DEATHS, _DEATHS_WITHIN_S = 10, 3600.0
_MOST_FAILED_STARTS = 3
"""In a row; of a server that has never been healthy, one less: its settings will be wrong."""
_LOG_LINES = 15
_STOPPING_S = 30.0


class ServerError(FusionError):
    """A server does not come up, or dies again and again. Stops the run."""


@dataclass(frozen=True)
class ServerCommand:
    """What a server is started with. Pickled to where it runs."""

    arguments: tuple[str, ...]
    """Of the command line, but for host and port."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of the process that starts it; what is empty is taken out."""
    startup_s: float = 1800.0
    """Until it is healthy: it may have to download its weights."""
    pause_s: float = 20.0
    """Before it is started once more: what was there before may still hold the GPU's memory."""


@dataclass(frozen=True)
class ServerState:
    url: str | None = None
    """Base URL of its API; None while it is not healthy."""
    deaths: int = 0
    error: str | None = None
    """It is given up, and why."""


class Server:
    """One `vllm serve`, under its keeper. A thread looks after it until `stop`."""

    def __init__(self, command: ServerCommand, host: str = LOOPBACK, key: str = "") -> None:
        """`host`: the address to listen on. `key`: what it is to ask for; empty: for none."""
        self._command, self._host = command, host
        # Not on the command line, which anybody reads; and none of the user's own.
        self._environment = {**command.environment, "VLLM_API_KEY": key}
        self._state = ServerState()
        self._stopping = threading.Event()
        self.log = Path(tempfile.mkdtemp(prefix="fusion-vllm-")) / "server.log"
        self._thread = threading.Thread(target=self._look_after, name="vllm", daemon=True)
        self._thread.start()

    def state(self) -> ServerState:
        return self._state

    def begin_stop(self) -> None:
        """Ask it, politely, to end."""
        self._stopping.set()

    def stop(self) -> None:
        """Ends it. Returns when it is gone."""
        self.begin_stop()
        self._thread.join(_STOPPING_S)
        if self._state.error is None:
            shutil.rmtree(self.log.parent, ignore_errors=True)

    def _look_after(self) -> None:
        try:
            self._keep_up()
        except Exception as error:  # noqa: BLE001 - it would vanish with this thread
            self._give_up(f"can't be run: {error}")

    def _keep_up(self) -> None:
        died_at: list[float] = []
        failed_starts, may_fail = 0, _MOST_FAILED_STARTS - 1
        while not self._stopping.is_set():
            if self._serve_once():
                failed_starts, may_fail = 0, _MOST_FAILED_STARTS
            else:
                failed_starts += 1
            if self._stopping.is_set():
                return
            now = time.monotonic()
            died_at = [at for at in died_at if now - at < _DEATHS_WITHIN_S] + [now]
            self._state = ServerState(None, self._state.deaths + 1)
            if failed_starts >= may_fail:
                self._give_up(f"did not come up, {failed_starts} times in a row")
                return
            if len(died_at) >= _MOST_DEATHS:
                self._give_up(f"died {len(died_at)} times within the hour")
                return
            if failed_starts:
                self._stopping.wait(self._command.pause_s)

    def _serve_once(self) -> bool:
        """From its start to its end. Returns whether it was healthy in between."""
        port = _free_port(self._host)
        place = ("--host", self._host, "--port", str(port))
        given = {**os.environ, **self._environment}
        removed = {name for name, value in self._environment.items() if not value}
        with _Kept(
            (*self._command.arguments, *place),
            {name: value for name, value in given.items() if name not in removed},
            self.log,
        ) as kept:
            root = f"http://{self._host}:{port}"
            if not self._comes_up(kept, root):
                return False
            self._state = replace(self._state, url=f"{root}/v1")
            self._wait_for_its_end(kept, root)
            self._state = replace(self._state, url=None)
            return True

    def _comes_up(self, kept: "_Kept", root: str) -> bool:
        deadline = time.monotonic() + self._command.startup_s
        while kept.is_running() and time.monotonic() < deadline:
            if _is_healthy(root):
                return True
            if self._stopping.wait(_LOOK_S):
                return False
        return False

    def _wait_for_its_end(self, kept: "_Kept", root: str) -> None:
        silences, look_at = 0, time.monotonic() + _HEALTH_EVERY_S
        while kept.is_running() and silences < _MOST_SILENCES:
            if self._stopping.wait(_LOOK_S):
                return
            if time.monotonic() >= look_at:
                silences = 0 if _is_healthy(root) else silences + 1
                look_at = time.monotonic() + _HEALTH_EVERY_S

    def _give_up(self, what: str) -> None:
        with contextlib.suppress(OSError):  # the log may be what can't be written
            lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            tail = "\n".join(f"  {printable(line)}" for line in lines)
            what = f"{what}. Its log ({socket.gethostname()}:{self.log}) ends:\n{tail}"
        command = " ".join(self._command.arguments)
        error = f"`{command}` {what}"
        self._state = ServerState(None, self._state.deaths, error)


class _Kept:
    """A command under its keeper (`keeper.py`); at the end of the block all of it is gone."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._status, theirs = os.pipe()
        try:
            with log.open("ab") as output:
                starter = subprocess.Popen(
                    [sys.executable, keeper.__file__, str(theirs), *command],
                    env=environment,
                    stdin=subprocess.PIPE,  # closed when this process ends, however it does
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs],
                )
        finally:
            os.close(theirs)
        assert starter.stdin is not None
        self._wanted = starter.stdin
        starter.wait()  # the keeper itself is no child of ours

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._wanted.close()
        while self._reads(timeout_s=_STOPPING_S) == b"x":
            pass
        os.close(self._status)

    def is_running(self) -> bool:
        """False from the moment that the command has ended, or the keeper has."""
        return self._reads(timeout_s=0) is None

    def _reads(self, timeout_s: float) -> bytes | None:
        ready, _, _ = select.select([self._status], [], [], timeout_s)
        return os.read(self._status, 1) if ready else None


def _is_healthy(root: str) -> bool:
    try:
        answer = httpx2.get(f"{root}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False)
    except httpx2.HTTPError:  # it does not listen yet, or not any more
        return False
    return answer.status_code == 200


def _free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port


class Servers(Protocol):
    """Several servers of one model."""

    key: str
    """What they ask for; empty: for none."""

    def states(self) -> list[ServerState]: ...

    def stop(self) -> None: ...


class LocalServers:
    """Beside this process, on the loopback address; each has its part of this process's GPUs."""

    key = ""

    def __init__(self, command: ServerCommand, count: int, gpus: int) -> None:
        """`gpus`: of each server."""
        found = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = [str(number) for number in range(count * gpus)]
        if found is not None:
            ids = [number for number in found.split(",") if number]
        if gpus and len(ids) < count * gpus:
            raise ServerError(
                f"{count} servers with {gpus} GPUs each need {count * gpus}, and this process may "
                f"use {len(ids)} (CUDA_VISIBLE_DEVICES={found}): change `replicas` or "
                "`tensor_parallel`"
            )
        self._servers = []
        for number in range(count):
            part = {"CUDA_VISIBLE_DEVICES": ",".join(ids[number * gpus : (number + 1) * gpus])}
            environment = {**command.environment, **(part if gpus else {})}
            self._servers.append(Server(replace(command, environment=environment)))

    def states(self) -> list[ServerState]:
        return [server.state() for server in self._servers]

    def stop(self) -> None:
        for server in self._servers:  # all at once, and without threads: at a process's end there
            server.begin_stop()  # are none to be had
        for server in self._servers:
            server.stop()


class ClusterServers:
    """Each in an actor of its own, wherever Ray finds the GPUs; it listens on its node's address
    within the cluster and asks for a key, which only this process knows. Ray starts the actor of a
    lost node again on another one."""

    def __init__(self, command: ServerCommand, count: int, gpus: int) -> None:
        import ray

        self.key = secrets.token_hex(16)
        # No CPUs: those of the cluster are shared out among the run's own workers.
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, num_gpus=gpus, num_cpus=0)(
            _NodeServer
        )
        self._actors = [actor.remote(command, self.key) for _ in range(count)]

    def states(self) -> list[ServerState]:
        """Of an actor that does not answer at once: none, until it does."""
        import ray

        asked = [actor.state.remote() for actor in self._actors]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=_HEALTH_TIMEOUT_S / 10)
        states = []
        for answer in asked:
            try:
                states.append(ray.get(answer) if answer in done else ServerState())
            except ray.exceptions.RayActorError as error:
                # One that is only on its way to another node is asked again.
                states.append(ServerState(error=_why_not(error)))
        return states

    def stop(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)  # its keeper notices, and ends the server


def _why_not(error: Exception) -> str | None:
    import ray

    is_away = isinstance(error, ray.exceptions.ActorUnavailableError)
    return None if is_away else f"an actor for vLLM can't be kept: {error}"


class _NodeServer:
    """The actor's class."""

    def __init__(self, command: ServerCommand, key: str) -> None:
        import ray

        self._server = Server(command, ray.util.get_node_ip_address(), key)

    def state(self) -> ServerState:
        return self._server.state()


def first_healthy(servers: Servers, within_s: float) -> Sequence[str]:
    """URLs, as soon as one server is healthy. Raises ServerError when none will be, or is in time;
    then they are ended."""
    deadline = time.monotonic() + within_s
    while True:
        states = servers.states()
        urls = [state.url for state in states if state.url]
        if urls:
            return urls
        errors = [state.error for state in states if state.error]
        if len(errors) == len(states):
            servers.stop()
            raise ServerError(errors[0])
        if time.monotonic() > deadline:
            servers.stop()
            raise ServerError(none_healthy(within_s))
        time.sleep(_LOOK_S)


def none_healthy(seconds: float) -> str:
    """What to say when there is no server for so long."""
    return (
        f"no replica of vLLM was healthy for {seconds / 60:.0f} minutes (`startup_minutes`). With "
        "`spread` each waits for GPUs: `ray status` says what is free; lower `replicas` or "
        "`tensor_parallel`."
    )
