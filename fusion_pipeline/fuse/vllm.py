"""Caption engine of one's own: the run keeps `vllm serve` up and asks it like any endpoint."""

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fusion_pipeline.dataset.weights import file_hash, weights_hash
from fusion_pipeline.fuse.base import CaptionOutcome, CaptionRequest
from fusion_pipeline.fuse.completions import CompletionConfig
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig
from fusion_pipeline.fuse.families import families, family_of
from fusion_pipeline.fuse.journal import Journal
from fusion_pipeline.fuse.servers import (
    ClusterServers,
    LocalServers,
    ServerCommand,
    ServerError,
    Servers,
    first_healthy,
    none_healthy,
)

_LOOK_S = 0.5
_OURS = {
    *("host", "port", "uds", "model", "served_model_name", "tensor_parallel_size", "revision"),
    *("tokenizer_revision", "enable_lora", "lora_modules", "max_lora_rank", "config"),
    *("allowed_local_media_path", "allowed_media_domains", "disable_uvicorn_access_log"),
    # More processes and GPUs than Ray is asked for.
    *("pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
}
_SECRET = {"api_key", "hf_token", "ssl_keyfile"}
_SPEED_ONLY = {
    *("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_memory_bytes"),
    *("mm_processor_cache_gb", "enable_prefix_caching", "swap_space", "api_server_count"),
    *("limit_mm_per_prompt", "disable_log_stats", "enforce_eager"),
}
"""Options that change no caption; all others are part of the lineage."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VllmConfig(CompletionConfig):
    """A model that the run serves itself. Further options of `vllm serve` go into `serve`."""

    model: str = Field(min_length=1)
    """Id on the hub, or a folder with a checkpoint."""
    revision: str | None = None
    """Commit of the hub's repository; without one the newest is served, whichever that is."""
    family: str | None = None
    """Name of a file in `fuse/families/`; by default found by the model's name."""
    lora: str | None = None
    """Folder of a LoRA adapter."""
    replicas: int = Field(default=1, ge=1, le=256)
    """Servers of the model."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of each replica."""
    device: Literal["gpu", "cpu"] = "gpu"
    """`cpu` for trying things out."""
    spread: bool = False
    """Replicas on any node of the cluster, listening on the nodes' addresses behind a key of the
    run: for private networks, since vLLM guards its API with that key and nothing else. By default
    all are on one node and listen on the loopback address."""
    serve: dict[str, Any] = Field(default_factory=dict)
    """By their names in Python, such as `max_num_seqs: 128`; they win over the family's."""
    command: str = "vllm"
    """Another environment's, such as `vllm-env/bin/vllm`."""
    concurrency: int = Field(default=256, ge=1, le=1000)
    """Most requests in flight, times the replicas that are healthy; vLLM queues what is above
    `max_num_seqs`."""
    timeout_s: float = Field(default=900.0, gt=0, allow_inf_nan=False)
    """Seconds that one attempt may take, its time in the queue included."""
    max_retries: int = Field(default=5, ge=0, le=100)
    """As of an endpoint."""
    startup_minutes: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Until a replica is healthy; its weights may have to be downloaded first."""
    captions_per_second: float | None = Field(default=None, gt=0)
    """The most that all replicas together were measured to make (`benchmarks.speed_of_light`); the
    run tells its share of it."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_family(cls, value: object) -> object:
        """A model alone will do; the size of images is the family's."""
        if isinstance(value, str):
            value = {"model": value}
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            known = _family(value["model"], value.get("family"))
            if known is not None:
                value = {"image_max_edge": known.image_max_edge, **value}
        return value

    @field_validator("serve")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isidentifier() or name != name.lower():
                raise ValueError(f"{name!r} is no option: write them like max_num_seqs")
            if name in _SECRET:
                raise ValueError(
                    f"{name} would be in command lines and tables: set an environment variable "
                    "that vLLM knows, such as HF_TOKEN"
                )
            if name in _OURS:
                raise ValueError(f"{name} is set by the run, or has a setting beside `serve`")
        return value

    def serve_options(self) -> dict[str, Any]:
        """All options of `vllm serve`, by their names in Python."""
        known = _family(self.model, self.family)
        options: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0}
        if known is not None:
            options |= known.serve.model_dump(exclude_defaults=True)
        if options.pop("trust_remote_code", False) and "trust_remote_code" not in self.serve:
            raise ServerError(
                f"{self.model} runs Python code of its own repository: read it, pin `revision`, "
                "and set `serve: {trust_remote_code: true}` in caption.engine.vllm"
            )
        return options | self.serve

    def fingerprint_fields(self) -> dict[str, Any]:
        """The fields that change captions. Reads a sample of the weights, if they are in a folder.

        Raises ServerError for a folder that is not there.
        """
        options, weights = self.serve_options(), _weights(self.model)
        fields = self.completion_fields()
        if weights is not None:  # wherever they lie
            fields["model"] = Path(self.model).name
        return {
            **fields,
            "revision": self.revision,
            "weights": weights,
            "lora": _weights(self.lora) if self.lora else None,
            "serve": {n: _contents(options[n]) for n in sorted(options) if n not in _SPEED_ONLY},
        }

    @property
    def served_name(self) -> str:
        return Path(self.lora or self.model).name


def server_command(config: VllmConfig) -> ServerCommand:
    """How a replica is started, but for its address. Raises ServerError."""
    base = Path(config.model).name
    arguments = [_executable(config.command), "serve", config.model]
    arguments += ["--served-model-name", base, "--disable-uvicorn-access-log"]
    if config.revision:
        arguments += ["--revision", config.revision]
    if config.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(config.tensor_parallel)]
    if config.lora:
        adapter = json.dumps({"name": config.served_name, "path": config.lora})
        arguments += ["--enable-lora", "--lora-modules", adapter]
        arguments += ["--max-lora-rank", str(_lora_rank(Path(config.lora)))]
    for name, value in config.serve_options().items():
        arguments += _option(name, value)
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # What holds for the run's own one-thread workers does not for a model that has the machine.
    environment |= {name: "" for name in ("OMP_NUM_THREADS",) if name in os.environ}
    return ServerCommand(tuple(arguments), environment, config.startup_minutes * 60)


def start_servers(config: VllmConfig) -> Servers:
    """Starts all replicas; does not wait for them."""
    command = server_command(config)
    gpus = config.tensor_parallel if config.device == "gpu" else 0
    if config.spread:
        return ClusterServers(command, config.replicas, gpus)
    return LocalServers(command, config.replicas, gpus)


class Vllm:
    """Caption engine (see `CaptionEngine`). Replicas that die are started again; requests go to
    those that are healthy, and wait while none is.

    Raises ServerError, at construction when a replica does not come up, later when all are given
    up; EndpointError when a server refuses what it is asked.
    """

    version: ClassVar[int] = 1

    def __init__(self, config: VllmConfig, journal: Journal | None = None) -> None:
        """Returns when the first replica is healthy. `journal`: not started."""
        self._patience_s = config.startup_minutes * 60
        self._servers = start_servers(config)
        first = first_healthy(self._servers, self._patience_s)
        try:
            asked = config.model_dump(include=set(EndpointConfig.model_fields) - {"model"})
            asked |= {"model": config.served_name, "url": list(first), "key_env": None}
            self._endpoint = Endpoint(
                EndpointConfig.model_validate(asked),
                journal,
                settings=config.fingerprint_fields(),
                key=self._servers.key or "none",
            )
        except BaseException:  # whatever it is: the servers must not outlive it
            self._servers.stop()
            raise
        self._watch: asyncio.Task[None] | None = None

    async def caption(self, request: CaptionRequest) -> CaptionOutcome:
        loop = asyncio.get_running_loop()
        if self._watch is None or self._watch.get_loop() is not loop:
            self._watch = asyncio.create_task(self._follow())
        return await self._endpoint.caption(request)

    async def _follow(self) -> None:
        """Tell the client which replicas there are, for as long as there may be one."""
        try:
            await self._follow_states()
        except Exception as error:  # noqa: BLE001 - raised to whoever waits for a replica
            self._endpoint.use((), error)

    async def _follow_states(self) -> None:
        seen_at, told = time.monotonic(), set[str]()
        while True:
            states = await asyncio.to_thread(self._servers.states)
            urls = [state.url for state in states if state.url]
            errors = [state.error for state in states if state.error]
            for error in set(errors) - told:
                print(f"a replica is given up: {error}", file=sys.stderr, flush=True)
                told.add(error)
            if len(errors) == len(states):
                raise ServerError(errors[0])
            if urls:
                seen_at = time.monotonic()
            elif time.monotonic() - seen_at > self._patience_s:
                raise ServerError(none_healthy(self._patience_s))
            self._endpoint.use(urls)
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """Ends the replicas, too."""
        if self._watch is not None:
            self._watch.cancel()
        await self._endpoint.close()
        self._servers.stop()  # here: at the end of the process no thread can be started any more


def _family(model: str, name: str | None) -> Any:
    if name is None:
        return family_of(model)
    for family in families():
        if family.name == name:
            return family
    known = ", ".join(family.name for family in families())
    raise ValueError(f"family: none is called {name!r}; known: {known}")


def _executable(command: str) -> str:
    beside = Path(sys.executable).parent / command
    found = str(beside) if beside.is_file() else shutil.which(command)
    if found is None:
        raise ServerError(
            f"no command {command!r}: pip install 'fusion-pipeline[serve]' (on a machine without "
            "GPU see docs/vllm.md), or set `command` to the vllm of another environment"
        )
    return found


def _option(name: str, value: object) -> list[str]:
    """`max_num_seqs`, 8 -> `--max-num-seqs 8`."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]


def _lora_rank(folder: Path) -> int:
    """The smallest rank vLLM knows that holds the adapter's."""
    place = folder / "adapter_config.json"
    try:
        rank = int(json.loads(place.read_text(encoding="utf-8"))["r"])
        return next(known for known in _LORA_RANKS if known >= rank)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ServerError(
            f"{place}: not the configuration of a LoRA adapter that vLLM serves "
            f"({type(error).__name__})"
        ) from None


def _weights(model: str) -> str | None:
    """Of a folder: `weights_hash`. None for a hub's id."""
    folder = Path(model)
    if folder.is_dir():
        return weights_hash(folder)
    if model.startswith((".", "/", "~")):
        raise ServerError(f"{model}: no such folder (`caption.engine.vllm`)")
    return None


def _contents(value: object) -> object:
    """Of an option that names a file or a folder what it holds, not where it lies."""
    if not isinstance(value, str) or not (path := Path(value)).exists():
        return value
    return weights_hash(path) if path.is_dir() else file_hash(path)
