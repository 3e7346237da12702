"""Runs a chain with Ray Data: one streaming pipeline, one actor pool for each pool of the chain.

Blocks carry shard numbers, not images: a pool reads a shard's tar itself, once for all its stages
(docs/decisions/001). A row of a block is either a shard to work on (`step` is null) or the result
of a step, which later pools pass on to the driver.
"""

import contextlib
import json
import logging
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from fusion_pipeline.engine.chain import Chain, ChainRunner
from fusion_pipeline.engine.errors import StageError, StalledError
from fusion_pipeline.engine.guard import Guard, Incident, Limits, default_memory
from fusion_pipeline.engine.shard import ShardResult
from fusion_pipeline.engine.stage import Resources
from fusion_pipeline.errors import FusionError

_ROW = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("step", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("worked", pa.int64()),
        pa.field("failed", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("first_error", pa.string()),
        pa.field("cpu_seconds", pa.float64()),
        pa.field("attempt", pa.int64()),
        pa.field("incident", pa.string()),  # JSON, in place of a result
    ]
)


def _row(shard: int, result: ShardResult | Incident | None = None) -> pa.Table:
    row: dict[str, Any] = {**dict.fromkeys(_ROW.names), "shard": shard}
    if isinstance(result, Incident):
        row |= {"step": result.step, "incident": json.dumps(asdict(result))}
    elif result is not None:
        row |= asdict(result)
    return pa.Table.from_pylist([row], schema=_ROW)


def _sign_of_life(shard: int) -> pa.Table:
    row = {**dict.fromkeys(_ROW.names), "shard": shard, "step": ""}
    return pa.Table.from_pylist([row], schema=_ROW)


def _result(row: dict[str, Any]) -> ShardResult | Incident:
    incident = row.pop("incident")
    return Incident(**json.loads(incident)) if incident else ShardResult(**row)


class _PoolWorker:
    """An actor of a pool: watches over the process that does the work; passes shard numbers on."""

    def __init__(self, chain: Chain, limits: Limits, neighbours: int) -> None:
        """`neighbours`: workers on each machine, this one included."""
        memory = limits.memory_bytes or default_memory(neighbours)
        memory = max(memory, int(chain.resources.memory_gb * 2**30))
        self._host: Guard | _Lanes
        if chain.resources.lanes > 1:
            self._host = _Lanes(chain)
        else:
            self._host = Guard(chain, replace(limits, memory_bytes=memory))
        self._metrics = _Metrics()
        self._broken: StageError | None = None
        try:
            self._host.open()
        except StageError as error:
            self._broken = error  # raised by the first task: an actor that dies at birth is retried

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        if self._broken is not None:
            raise self._broken
        block = block.select(_ROW.names).cast(_ROW)
        for number, row in enumerate(block.to_pylist()):
            if row["step"] is not None:
                yield block.slice(number, 1)  # of an earlier pool
                continue
            for result in self._host.run(row["shard"]):
                if result is None:
                    yield _sign_of_life(row["shard"])
                    continue
                self._metrics.add(result)
                yield _row(row["shard"], result)
            yield _row(row["shard"])


class _Lanes:
    """Runs a chain in this process, for as many shards at a time as there are calls."""

    def __init__(self, chain: Chain) -> None:
        self._runner = ChainRunner(chain)

    def open(self) -> None:
        self._runner.open()

    def run(self, shard: int) -> Iterator[ShardResult | None]:
        """Like `Guard.run`: None now and then, as long as the stage says that it is at work."""
        found, watch = _collected(self._runner.run(shard)), self._runner.watch
        while True:
            ticks = watch.ticks
            try:
                result = found.get(timeout=_SIGN_OF_LIFE_S)
            except queue.Empty:
                if watch.ticks != ticks:
                    yield None
                continue
            if isinstance(result, Exception):
                raise result
            if result is None:
                return
            yield result


class _Metrics:
    """The run's numbers for Prometheus, by Ray's own exporter."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        self._rows = Counter("fusion_rows", "Rows that a step worked on", ("step", "status"))
        self._shards = Counter("fusion_shards", "Tables committed", ("step",))
        self._seconds = Histogram(
            "fusion_shard_seconds", "Time of a step on one shard", _SECONDS, ("step",)
        )
        self._lost = Counter("fusion_processes_lost", "Worker processes lost", ("step", "verdict"))

    def add(self, result: ShardResult | Incident) -> None:
        tags = {"step": result.step}
        if isinstance(result, Incident):
            self._lost.inc(1, {**tags, "verdict": result.verdict})
            return
        self._shards.inc(1, tags)
        self._seconds.observe(max(result.seconds, 1e-6), tags)
        for status, rows in (("ok", result.worked - result.failed), ("failed", result.failed)):
            if rows > 0:
                self._rows.inc(rows, {**tags, "status": status})


_SECONDS = [0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800]


@dataclass(frozen=True)
class RayOptions:
    address: str | None = None
    """Of a running cluster (`auto`, `ray://...`); None: one is started for the run."""
    cpus: int | None = None
    """CPUs of a cluster started for the run; None: all of this machine."""
    dashboard: bool = False


_ENVIRONMENT = {
    # One thread a worker, many workers: about twice as fast here as threads inside the models.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def start_ray(options: RayOptions) -> None:
    """Connect to the cluster, or start one on this machine with a loopback dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread that still asks Ray for results after the run's end would start it anew.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    address = options.address or os.environ.get("RAY_ADDRESS")  # a submitted job has the latter
    if address is None:
        # Ray Data trips Ray's own warning on each pool (ray-project/ray#53727) from C++.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    # Token authentication stays on; that it is on needs no warning.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)

    if ray.is_initialized():
        return
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "runtime_env": {"env_vars": _ENVIRONMENT},
    }
    if address is None:
        common |= {
            "address": "local",  # never the Ray of somebody else's run on this machine
            "num_cpus": options.cpus,
            "include_dashboard": options.dashboard,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": 256 * 2**20,  # only shard numbers travel
        }
    else:
        common["address"] = address
    with _quiet_stderr():
        try:
            ray.init(**common)
        except ConnectionError as error:
            raise StageError(f"can't connect to Ray at {address}: {error}{_token_hint()}") from None


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what C++ prints about its own log level; failures to start are raised, not printed."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _token_hint() -> str:
    """A cluster asks for a token as soon as its head's machine has one; Ray's client sends it only
    when told to (2.60), and to a cluster that wants none it must not."""
    if "RAY_AUTH_MODE" in os.environ:
        return ""
    return ". If it asks for a token, as `ray start` does by default: export RAY_AUTH_MODE=token"


def stop_ray() -> None:
    import ray

    ray.shutdown()


def run_on_ray(
    chain: Chain,
    shards: Sequence[int],
    limits: Limits | None = None,
    reconnect: Callable[[str], None] | None = None,
) -> Iterator[ShardResult | Incident]:
    """Like `chain.run_in_process`, in parallel; results come as shards finish.

    `reconnect`: leaves Ray and joins it again. It is called, with what to tell, when nothing comes
    for far longer than workers may be silent, which happens when Ray loses a task together with a
    node; then all begins anew, and finished steps are not done twice.

    Raises StageError when a stage breaks; StalledError when nothing comes, and that was so from
    the beginning, or there is no `reconnect`. Committed shards stay.
    """
    done: set[int] = set()
    while True:
        any_came = False
        left = [shard for shard in shards if shard not in done]
        try:
            for result in _run_once(chain, left, limits or Limits(), done):
                any_came = True
                yield result
            return
        except StalledError as stalled:
            if reconnect is None or not any_came:
                raise
            why = str(stalled)
        reconnect(why)


def _run_once(
    chain: Chain, shards: Sequence[int], limits: Limits, done: set[int]
) -> Iterator[ShardResult | Incident]:
    """`done` gets the shards that are through all pools."""
    import ray
    from ray.data import ActorPoolStrategy

    _configure_ray_data()
    pools = chain.pools()
    sizes = [_pool_size(pool, len(shards)) for pool in pools]
    total_cpus = float(ray.cluster_resources().get("CPU", 1))
    share = max(0.01, (total_cpus - 0.1) / sum(sizes))
    nodes = sum(node["Alive"] for node in ray.nodes())
    neighbours = -(-sum(sizes) // max(nodes, 1))
    with _rays_errors():
        dataset = ray.data.from_arrow([_row(shard) for shard in shards])
    for pool, size in zip(pools, sizes, strict=True):
        resources = pool.resources
        dataset = dataset.map_batches(
            _PoolWorker,
            fn_constructor_args=(pool, limits, neighbours),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1 + resources.lanes),
            ray_remote_args_fn=_threads(resources.lanes),
            # Shares, not whole CPUs: pools that together ask for more than there is never start.
            num_cpus=round(min(resources.cpus, share), 3),
            num_gpus=resources.gpus or None,
            memory=int(resources.memory_gb * 2**30) or None,
        )
    start_s = max(limits.start_s, *(pool.resources.start_s for pool in pools))
    for row in _timely(_rows(dataset), start_s + 3 * limits.stall_s):
        if row["step"]:  # neither a shard nor a sign of life
            yield _result(row)
        elif row["step"] is None:
            done.add(row["shard"])


def _threads(lanes: int) -> Callable[[], dict[str, int]] | None:
    """An option of actors that `map_batches` has no parameter for."""
    return partial(dict, max_concurrency=lanes) if lanes > 1 else None


_SIGN_OF_LIFE_S = 60.0


@contextlib.contextmanager
def _rays_errors() -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise _own_error(error) from error


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    with _rays_errors():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()


def _timely(rows: Iterator[dict[str, Any]], silence_s: float) -> Iterator[dict[str, Any]]:
    """The same rows; raises StalledError when none comes for so long. Workers have an eye on
    themselves, so this is Ray's: a node is lost for good, or what a pool asks for is not there."""
    found = _collected(rows)
    while True:
        try:
            row = found.get(timeout=silence_s)
        except queue.Empty:
            raise StalledError(_stalled(silence_s)) from None
        if isinstance(row, Exception):
            raise row
        if row is None:
            return
        yield row


T = TypeVar("T")


def _collected(items: Iterator[T]) -> "queue.SimpleQueue[T | Exception | None]":
    """The items as a thread of their own gets them, then None; or what they end with."""
    found: queue.SimpleQueue[T | Exception | None] = queue.SimpleQueue()

    def collect() -> None:
        try:
            for item in items:
                found.put(item)
            found.put(None)
        except Exception as error:  # noqa: BLE001 - for the reader to raise, in its own thread
            found.put(error)

    threading.Thread(target=collect, name="collector", daemon=True).start()
    return found


def _stalled(silence_s: float) -> str:
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU", "memory")}
    return (
        f"no step of any shard was finished for {silence_s / 60:.0f} minutes. Ray has {nodes} "
        f"nodes; free: {free}. `ray status` and the dashboard say what it waits for. Finished "
        "shards are kept; the same command resumes."
    )


def _call(function: Callable[..., None], *arguments: object) -> None:
    function(*arguments)  # Ray wants a Python function: neither a method nor `operator.call`


def run_task(resources: Resources, function: Callable[..., None], *arguments: object) -> None:
    """Run a function once in a worker process: the driver's memory stays small.

    Raises what the function raises, and StageError where no node has these resources.
    """
    import ray
    from ray.exceptions import RayTaskError

    try:
        for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            if wanted > (most := _largest(kind)):  # Ray would wait for such a node
                raise StageError(
                    f"a step asks for {wanted:g} {kind}s; the largest node has {most:g}"
                )
        task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(_call)
        ray.get(task.remote(function, *arguments))
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


def _largest(kind: str) -> float:
    """CPUs or GPUs of the node that has most of them."""
    import ray

    return max((n["Resources"].get(kind, 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)


def _pool_size(pool: Chain, shards: int) -> int:
    import ray

    available = ray.cluster_resources()
    resources = pool.resources
    largest = _largest("GPU")
    if resources.gpus > largest:
        raise StageError(
            f"stages {', '.join(s.table for s in pool.steps)} ask for {resources.gpus:g} GPUs a "
            f"worker; the cluster has {available.get('GPU', 0):.0f}, and {largest:.0f} on its "
            "largest node. (Replicas of vLLM on several nodes: `spread: true`.)"
        )
    fits = available.get("CPU", 1) / max(resources.cpus, 0.01)
    if resources.gpus:
        fits = available["GPU"] / resources.gpus
    return max(1, min(resources.workers or int(fits), shards))


def _configure_ray_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours shows stages and samples
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # each result is a block of its own: it streams at once
    # By default a worker waits, up to 0.1 s a shard, until the driver has taken its last results.
    context._max_num_blocks_in_streaming_gen_buffer = 64
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # There is no other way yet to give an actor threads; below Ray 2.64, as pyproject.toml says.
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")


_RAYS_ADVICE = "\nFailed to apply UDF transform"
"""From here on a message is Ray Data's, on how to make it try again."""


def _own_error(error: BaseException) -> FusionError:
    """The worker's own error out of the wrappers that Ray puts around it."""
    from ray.exceptions import RayTaskError

    cause: BaseException | None = error
    while cause is not None:
        # Ray makes a class of both kinds, with a trace for message: its `cause` is the error.
        if isinstance(cause, FusionError) and not isinstance(cause, RayTaskError):
            cause.args = (str(cause).split(_RAYS_ADVICE)[0],)
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return StageError(f"a Ray worker failed: {error}")
