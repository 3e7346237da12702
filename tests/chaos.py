"""Chaos: a chain of five cheap stages over 200 shards, and somebody who breaks things by seed.

    python -m tests.chaos --seeds 0-29 [--log chaos]

Each seed names a place (a small disk, or an S3 server that misbehaves), a Ray (one node, or a
cluster that loses one) and the faults: kill -9 of driver, actor, model process or node; processes
frozen for a while, or frozen, orphaned by the death of their driver and woken under the next one; a
full disk; an S3 that fails, lags, loses answers and goes away. The driver is started again until it
comes to its end. Then the dataset is that of an undisturbed plain loop, byte for byte.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import fsspec
import psutil

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.verify import verify
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import Resources
from tests.faulty_s3 import S3Server, s3_server
from tests.killing import REPOSITORY, family_of
from tests.toy import ToySource, ToyStage, run_toy, seen_by_readers, steps_of

SHARDS = 200
DISTURBED_STARTS = 2
MAX_STARTS = 6
"""The last one that counts is left in peace; more only if it gives up all the same."""
DISK_MB = 96
MARK = "FUSION_CHAOS"
"""Environment variable that all processes of a seed have."""
RESUMABLE = ("the same command resumes", "is in use by run", "not committing", "worker failed",
             "Wait for it or stop it", "died 3 times while it loaded", "by no one image",
             "no longer held")  # fmt: skip
"""What a driver may say that gives up under faults; anything else is a defect."""


def chaos_steps(pause: float) -> tuple[Step, ...]:
    """Five stages in two pools."""
    late = Resources(cpus=0.9)
    stages = [
        ToyStage("a", pause=pause),
        ToyStage("b", ("a",), pause),
        ToyStage("nested/c", ("a", "b"), pause, resources=late),
        ToyStage("d", ("nested/c",), pause, resources=late),
        ToyStage("e", ("a", "d"), pause, resources=late),
    ]
    return steps_of(ToySource(pause), stages)


# The driver: a process of its own


def drive(root: str, shards: int, pause: float, nodes: int) -> None:
    """SIGUSR2 makes a node of a cluster disappear; another one comes after a while."""
    from fusion_pipeline.engine.guard import Limits
    from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, start_ray, stop_ray
    from fusion_pipeline.errors import FusionError

    options = RayOptions(cpus=2)
    if nodes == 1:
        start_ray(options)
    else:
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=small)
        others = [cluster.add_node(**small) for _ in range(nodes - 1)]
        options = RayOptions(address=cluster.address)
        start_ray(options)

        def lose_node() -> None:
            cluster.remove_node(others.pop(), allow_graceful=False)
            time.sleep(2)
            others.append(cluster.add_node(**small))

        signal.signal(signal.SIGUSR2, lambda *_: threading.Thread(target=lose_node).start())

    def reconnect(why: str) -> None:
        print(f"beginning anew: {why}", flush=True)
        stop_ray()
        start_ray(options)

    run = partial(run_on_ray, limits=Limits(stall_s=45, start_s=45), reconnect=reconnect)
    try:
        run_toy(root, range(shards), chaos_steps(pause), run)  # type: ignore[arg-type]
    except FusionError as error:
        sys.exit(f"stopped: {error}")
    finally:
        stop_ray()


# The one who breaks things


@dataclass
class Seed:
    seed: int
    place: str
    """disk or s3"""
    nodes: int
    faults: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    stops: list[str] = field(default_factory=list)
    """What each driver said that gave up by itself."""
    seconds: float = 0.0


def plan(seed: int) -> Seed:
    """Every fifth on S3; every other one on a cluster of two nodes."""
    return Seed(seed, "s3" if seed % 5 == 2 else "disk", 2 if seed % 2 else 1)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system with little room. Needs root."""
    folder.mkdir()
    size = f"size={DISK_MB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Breaker:
    def __init__(self, log: Seed, disk: Path | None, server: S3Server | None, log_file: Path):
        self.log, self.disk, self.server = log, disk, server
        self.random = random.Random(log.seed)
        self.driver_log = log_file
        self.frozen: list[psutil.Process] = []

    def run(self, root: str, shards: int) -> None:
        """Start the driver again and again, at last without faults, until it comes to its end."""
        environment = {**os.environ, **(self.server.environment if self.server else {}),
                       MARK: str(self.driver_log)}  # fmt: skip
        for start in range(MAX_STARTS):
            is_last = start >= DISTURBED_STARTS
            self.log.starts += 1
            pause = 0.0 if is_last else 0.01
            command = [sys.executable, "-m", "tests.chaos", "--drive", root, f"--shards={shards}",
                       f"--pause={pause}", f"--nodes={self.log.nodes}"]  # fmt: skip
            with self.driver_log.open("wb") as output:
                driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment,
                                          stdout=output, stderr=subprocess.STDOUT)  # fmt: skip
            if is_last:
                self.calm()
            else:
                self.disturb(driver)
            try:
                driver.wait(timeout=600)
            except subprocess.TimeoutExpired:
                driver.kill()
                raise AssertionError(f"seed {self.log.seed}: the driver hangs") from None
            text = self.driver_log.read_text(errors="replace")
            if driver.returncode == 0 and is_last:
                return
            if driver.returncode not in (0, -signal.SIGKILL):
                self.log.stops.append(text[text.find("stopped: ") :][:300])
                assert any(words in text for words in RESUMABLE), text[-3000:]
        raise AssertionError(f"seed {self.log.seed}: no end after {MAX_STARTS} starts")

    def disturb(self, driver: subprocess.Popen[bytes]) -> None:
        """One fault after another while the driver lives."""
        if self.server:
            self.server.misbehave(rate=0.03, seed=self.log.seed, max_delay=0.3)
        if self.random.random() < 0.8:  # otherwise while it starts
            self.wait_for_work(driver)
        for _ in range(self.random.randint(2, 5)):
            if driver.poll() is not None:
                return
            self.break_something(driver)
            time.sleep(self.random.uniform(0.2, 1.5))

    def wait_for_work(self, driver: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 60
        while driver.poll() is None and not self.family(driver, "engine.child"):
            assert time.monotonic() < deadline, self.driver_log.read_text()
            time.sleep(0.1)
        time.sleep(self.random.uniform(0, 4))

    def break_something(self, driver: subprocess.Popen[bytes]) -> None:
        faults = ["kill_model", "kill_actor", "freeze", "kill_driver", "orphan"]
        faults += ["fill_disk"] if self.disk else ["outage"]
        faults += ["kill_node"] if self.log.nodes > 1 else []
        fault = self.random.choice(faults)
        self.log.faults[fault] = self.log.faults.get(fault, 0) + 1
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself at this moment
            getattr(self, fault)(driver)

    def family(self, driver: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
        if driver.poll() is not None:
            return []
        return [process for process, command in family_of(driver) if word in command]

    def one(self, driver: subprocess.Popen[bytes], word: str) -> psutil.Process | None:
        found = self.family(driver, word)
        return self.random.choice(found) if found else None

    def kill_model(self, driver: subprocess.Popen[bytes]) -> None:
        if victim := self.one(driver, "engine.child"):
            victim.kill()

    def kill_actor(self, driver: subprocess.Popen[bytes]) -> None:
        if victim := self.one(driver, "ray::MapWorker"):
            victim.kill()

    def kill_driver(self, driver: subprocess.Popen[bytes]) -> None:
        driver.kill()
        driver.wait()

    def kill_node(self, driver: subprocess.Popen[bytes]) -> None:
        self.wait_for_work(driver)  # before that it does not listen
        if driver.poll() is None:
            driver.send_signal(signal.SIGUSR2)
            time.sleep(3)

    def freeze(self, driver: subprocess.Popen[bytes]) -> None:
        word = self.random.choice(["engine.child", "ray::MapWorker", "tests.chaos"])
        victim = psutil.Process(driver.pid) if word == "tests.chaos" else self.one(driver, word)
        if victim:
            victim.suspend()
            time.sleep(self.random.uniform(0.5, 3))
            victim.resume()

    def orphan(self, driver: subprocess.Popen[bytes]) -> None:
        """Model processes and actors freeze, their driver dies; they wake up under the next one."""
        for victim in self.family(driver, "engine.child") + self.family(driver, "ray::MapWorker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.suspend()
                self.frozen.append(victim)
        driver.kill()
        driver.wait()
        threading.Timer(self.random.uniform(8, 14), self.wake).start()

    def wake(self) -> None:
        while self.frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.frozen.pop().resume()

    def clean_up(self) -> None:
        """The nodes of a cluster outlive a killed driver."""
        self.wake()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.driver_log):
                    process.kill()

    def fill_disk(self, driver: subprocess.Popen[bytes]) -> None:
        assert self.disk is not None
        balloon = self.disk / "balloon"
        with contextlib.suppress(OSError), balloon.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        time.sleep(self.random.uniform(0.5, 3))
        balloon.unlink()

    def outage(self, driver: subprocess.Popen[bytes]) -> None:
        assert self.server is not None
        self.server.outage()
        time.sleep(self.random.uniform(0.5, 6))
        self.server.misbehave(rate=0.03, seed=self.log.seed, max_delay=0.3)

    def calm(self) -> None:
        if self.server:
            self.server.behave()


def content_of(root: str) -> dict[str, bytes]:
    """Every file a reader could take: all of shards/, tables/ and artifacts/."""
    storage = Storage(root)
    names = [n for n in storage.files("") if n.startswith(("shards/", "tables/", "artifacts/"))]
    return seen_by_readers({name: storage.read(name) for name in names})


def run_seed(seed: int, folder: Path, expected: dict[str, bytes], shards: int = SHARDS) -> Seed:
    """Raises AssertionError when the dataset is not what it has to be. `folder` is made."""
    log, started = plan(seed), time.monotonic()
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        disk = server = None
        if log.place == "disk":
            disk = stack.enter_context(small_disk(folder / "disk"))
            root = str(disk / "data")
        else:
            server = stack.enter_context(s3_server())
            server.make_bucket("chaos")
            for name, value in server.environment.items():
                stack.enter_context(_environment(name, value))
            root = "s3://chaos/data"
            # Clients are kept by place; the next seed's server has another port.
            stack.callback(fsspec.get_filesystem_class("s3").clear_instance_cache)
        breaker = Breaker(log, disk, server, folder / "driver.log")
        stack.callback(breaker.clean_up)
        breaker.run(root, shards)
        found = content_of(root)
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:10]
        assert [name for name in found if found[name] != expected[name]] == []
        assert [p for p in verify(Dataset.open(root)) if p is not None] == []
    log.seconds = round(time.monotonic() - started, 1)
    return log


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)


def undisturbed(folder: Path, shards: int = SHARDS) -> dict[str, bytes]:
    run_toy(folder, range(shards), chaos_steps(0.0))
    return content_of(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0-29")
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--log", help="Name of a result in benchmarks/results/.")
    parser.add_argument("--drive")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.shards, options.pause, options.nodes)
        return
    first, _, last = options.seeds.partition("-")
    logs = []
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    expected = undisturbed(folder / "plain", options.shards)
    for seed in range(int(first), int(last or first) + 1):
        logs.append(run_seed(seed, folder / f"{seed}", expected, options.shards))
        print(json.dumps(asdict(logs[-1])), flush=True)
    shutil.rmtree(folder)
    if options.log:
        from benchmarks.result import finish

        rows = [asdict(log) for log in logs]
        finish(options.log, len(logs), "seeds", len(logs), True, rows)


if __name__ == "__main__":
    from tests import chaos  # under its own name: stages travel to other processes by it

    chaos.main()
