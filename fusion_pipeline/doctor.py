"""`fusion doctor`: versions, Ray, disk, memory, models, keys; what is missing and the fix."""

import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from experts.base import ASSETS
from fusion_pipeline import __version__
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError
from fusion_pipeline.fuse.servers import ServerError
from fusion_pipeline.fuse.vllm import VllmConfig, server_command
from fusion_pipeline.pipeline import Pipeline

_CORE = ("ray", "pyarrow", "onnxruntime", "rapidocr", "pillow", "webdataset", "openai")
_MIN_FREE_GB = 5.0
_MIN_SHM_GB = 1.0


@dataclass(frozen=True)
class Check:
    name: str
    state: Literal["ok", "warn", "missing"]
    found: str
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(pipeline: Pipeline | None) -> list[Check]:
    """All checks; those of a config's own needs when there is one. Starts nothing."""
    checks = [
        Check("fusion-pipeline", "ok", __version__),
        Check("Python", "ok", f"{platform.python_version()} ({sys.executable})"),
        *_packages(),
        _faiss(),
        _demo(),
        _gpu(),
        *_memory(),
        _outputs(pipeline.config.run if pipeline else "."),
        *_models(),
        *_ray(pipeline),
    ]
    if pipeline is not None:
        checks += [*_source(pipeline), *_engine(pipeline)]
    return checks


def _packages() -> Iterator[Check]:
    for name in _CORE:
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "missing", "not installed", f"pip install {name}")


def _faiss() -> Check:
    for name in ("faiss-gpu-cu12", "faiss-cpu"):
        try:
            return Check("FAISS", "ok", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    fix = "pip install 'fusion-pipeline[faiss-cpu]' (or [faiss-gpu])"
    return Check("FAISS", "missing", "not installed", fix)


def _demo() -> Check:
    if importlib.util.find_spec("skimage") and importlib.util.find_spec("matplotlib"):
        return Check("demo photos", "ok", "scikit-image, matplotlib")
    fix = "for `fusion demo-data` and --smoke: pip install 'fusion-pipeline[demo]'"
    return Check("demo photos", "warn", "not installed", fix)


def _gpu() -> Check:
    found = shutil.which("nvidia-smi")
    if found:
        return Check("GPU", "ok", "nvidia-smi found")
    return Check("GPU", "ok", "none; the shipped models run on CPU")


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    yield Check("CPUs", "ok", str(len(os.sched_getaffinity(0))))
    low = memory.available < 2 * 2**30
    yield Check("memory", "warn" if low else "ok", found, "close other programs" if low else "")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / 2**30
        low = free < _MIN_SHM_GB
        fix = "Ray needs more; containers: --shm-size=2g" if low else ""
        yield Check("shared memory", "warn" if low else "ok", f"{free:.1f} GiB free", fix)


def _outputs(run: str) -> Check:
    if "://" not in run:
        return _disk(Path(run))
    try:
        Storage(run).files("")
    except (FusionError, ImportError, OSError) as error:
        return Check("outputs", "missing", f"{run}: {error}", "see docs/running.md, Object stores")
    return Check("outputs", "ok", f"{run} can be listed")


def _disk(place: Path) -> Check:
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    low = free < _MIN_FREE_GB
    fix = f"less than {_MIN_FREE_GB:.0f} GiB: set `run` to a larger disk" if low else ""
    return Check("disk", "warn" if low else "ok", f"{free:.0f} GiB free at {place.resolve()}", fix)


def _models() -> Iterator[Check]:
    for name in ("efficientnet_lite2", "nanodet_coco80", "centerface", "nsfwjs"):
        path = ASSETS / f"{name}.onnx"
        if path.is_file():
            yield Check(path.name, "ok", f"{path.stat().st_size / 1e6:.1f} MB")
        else:
            yield Check(path.name, "missing", f"not in {ASSETS}", "reinstall fusion-pipeline")


def _ray(pipeline: Pipeline | None) -> Iterator[Check]:
    runner = pipeline.config.runner if pipeline else None
    address = (runner.ray_address if runner else None) or os.environ.get("RAY_ADDRESS")
    yield Check("Ray address", "ok", address or "none: each run starts its own")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        fix = "anyone who reaches the ports can run code: unset RAY_AUTH_MODE"
        yield Check("Ray authentication", "warn", "RAY_AUTH_MODE switches it off", fix)
    else:
        token = _ray_token()
        yield Check("Ray authentication", "ok", f"token ({token})")
    host = os.environ.get("RAY_DASHBOARD_HOST", "127.0.0.1")
    if not _is_loopback(host):
        fix = "unset RAY_DASHBOARD_HOST; reach it through an SSH tunnel"
        yield Check("Ray dashboard", "warn", f"bound to {host}", fix)
    else:
        on = "on" if runner and runner.dashboard else "off (runner.dashboard=true shows it)"
        yield Check("Ray dashboard", "ok", f"{on}, loopback only")


def _ray_token() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "from RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return f"in {path}" if path.is_file() else "made at the first start"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _source(pipeline: Pipeline) -> Iterator[Check]:
    source = pipeline.config.source
    kind = "webdataset" if source.webdataset else "folder"
    place = source.webdataset or source.folder or ""
    if "://" in place:
        yield Check(f"source.{kind}", "warn", place, "not looked at: on another machine")
    elif Path(place).is_dir():
        yield Check(f"source.{kind}", "ok", str(Path(place).resolve()))
    else:
        fix = f"set source.{kind} to your data, or: fusion demo-data {Path(place).parent}"
        yield Check(f"source.{kind}", "missing", f"no folder {place}", fix)


def _answers(url: str) -> bool:
    """Whether something accepts connections at the host and port of a URL."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=2):
            return True
    except OSError:
        return False


def _vllm(config: VllmConfig) -> Check:
    try:
        command = server_command(config)
    except ServerError as error:
        found, _, fix = str(error).partition(": ")
        return Check("caption engine", "missing", found, fix)
    return Check("caption engine", "ok", f"{config.model}, served by {command.arguments[0]}")


def _engine(pipeline: Pipeline) -> Iterator[Check]:
    choice = pipeline.config.caption.engine
    if choice.vllm is not None:
        yield _vllm(choice.vllm)
        return
    endpoint = choice.endpoint or choice.batch
    if endpoint is None:
        yield Check("caption engine", "ok", "composer (offline baseline)")
        return
    for url in (endpoint.url,) if isinstance(endpoint.url, str) else endpoint.url:
        found = f"{endpoint.model} at {url}"
        if _answers(url):
            there = f"{found} (a server listens; --smoke tries the model)"
            yield Check("caption engine", "ok", there)
        else:
            fix = "start the server, or mend the `url` of caption.engine"
            yield Check("caption engine", "warn", f"{found}: nothing listens there", fix)
    names = (endpoint.key_env, f"{endpoint.key_env}_FILE")
    if endpoint.key_env and not any(os.environ.get(name) for name in names if name):
        fix = f"export {endpoint.key_env}=… or set `key_env: null` in caption.engine"
        yield Check("caption key", "missing", f"{endpoint.key_env} is not set", fix)
