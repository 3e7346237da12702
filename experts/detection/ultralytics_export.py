"""A checkpoint of ultralytics (`.pt`) as an ONNX file: made once, in a process apart.

Such a checkpoint is a pickle, which may run any program when it is opened. So it is opened by a
process that is given nothing and goes when it is done: the library's own list of what a checkpoint
may hold, no network, no other programs, a folder of its own, a time limit. None of it is a sandbox
(docs/ultralytics.md says what each part holds back).

At the top only the standard library: a process leaves the network while it has a single thread.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusion_pipeline.errors import FusionError

VERSION = 1
"""Raised by hand when the ONNX file of the same checkpoint changes: part of its name."""

LICENCE = (
    "its licence is AGPL-3.0, and what you build on it falls under that licence, too, unless you "
    "buy another one from Ultralytics"
)

_SECONDS = 900
_MEMORY, _FILE = 32 * 2**30, 8 * 2**30
_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_REFUSED = frozenset(
    {
        "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pickle.find_class",
        "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
        "socket.sendmsg", "socket.sendto", "subprocess.Popen",
    }
)  # fmt: skip


class ExportError(FusionError):
    """A checkpoint that could not be made an ONNX file."""


def exported(checkpoint: Path, sha256: str, image_size: int | None) -> Path:
    """The ONNX file of a checkpoint, out of the cache or made now. Workers that want the same one
    wait for the first. `image_size`: None for the one that the checkpoint was trained at.

    Raises ExportError; also when the file is not the one of this sha256.
    """
    folder = cache_folder()
    name = f"{sha256}-{image_size or 'trained'}-v{VERSION}.onnx"
    made = folder / name
    if made.exists():
        return made
    _check_packages(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        # Where locks are unknown, several make it, and each puts a whole file in place.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
                _export(checkpoint, sha256, image_size, Path(scratch))
                os.replace(Path(scratch) / "model.onnx", made)
    return made


def cache_folder() -> Path:
    """Where ONNX files are kept: `$XDG_CACHE_HOME/fusion-pipeline/ultralytics`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusion-pipeline" / "ultralytics"


def _check_packages(checkpoint: Path) -> None:
    if all(importlib.util.find_spec(name) for name in ("ultralytics", "onnx", "torch")):
        return
    raise ExportError(
        f"{checkpoint}: to make an ONNX file of it, ultralytics is needed once: "
        f"pip install 'fusion-pipeline[ultralytics]' ({LICENCE}). Or make it elsewhere (yolo "
        f"export model={checkpoint.name} format=onnx dynamic=True) and set model: "
        f"{checkpoint.with_suffix('.onnx').name}"
    )


def _export(checkpoint: Path, sha256: str, image_size: int | None, scratch: Path) -> None:
    # A copy, so that what is opened is what was hashed.
    shutil.copyfile(checkpoint, scratch / "model.pt")
    with (scratch / "model.pt").open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ExportError(f"{checkpoint}: its sha256 is no longer {sha256}")
    try:
        code = _run(
            [sys.executable, "-P", "-m", __name__, str(scratch), str(image_size or "")],
            _environment(scratch),
            scratch,
        )
    except subprocess.TimeoutExpired:
        minutes = _SECONDS / 60
        raise ExportError(
            f"{checkpoint}: its export took more than {minutes:.0f} minutes"
        ) from None
    if not (scratch / "model.onnx").exists():
        with contextlib.suppress(FileNotFoundError):
            told = (scratch / "error").read_text(encoding="utf-8", errors="replace")
            raise ExportError(f"{checkpoint}: {told}")
        raise ExportError(f"{checkpoint}: the process that exports it ended with code {code}")


def _environment(scratch: Path) -> dict[str, str]:
    """All that the process is told: above all no keys, no proxies, nobody's home."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    folders = ("HOME", "TMPDIR", "YOLO_CONFIG_DIR", "MPLCONFIGDIR", "TORCH_HOME", "XDG_CACHE_HOME")
    return {
        **kept,
        **dict.fromkeys(folders, str(scratch)),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        "LOGNAME": "export",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "ULTRALYTICS_SAFE_LOAD": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true",
        "YOLO_VERBOSE": "false",
    }


def _run(command: list[str], environment: dict[str, str], folder: Path) -> int:
    """The exit code. Whatever happens here, nothing of it goes on running."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(_SECONDS)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def confine() -> None:
    """Take from this process, which must have a single thread, what an export does not need."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE),
    ):
        _, hard = resource.getrlimit(kind)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))
    # A network of its own without a way out, where the kernel lets users have that (many
    # containers don't); in a user namespace root loses its powers over the machine, too.
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWNET)
    # It can't be removed again, and sees whatever Python code does, the library's downloads too.
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        raise PermissionError(
            "it would be opened as a plain pickle: this version of ultralytics knows no restricted "
            "loading, a newer one does"
        )
    if event in _REFUSED:
        raise PermissionError(f"{event} is refused while a checkpoint is exported")


def main(scratch: str, image_size: str) -> None:
    """Makes `model.onnx` of `model.pt`, or a file `error`."""
    confine()
    folder = Path(scratch)
    try:
        _make_onnx(folder / "model.pt", {"imgsz": int(image_size)} if image_size else {})
    except Exception as error:  # whatever the library raises goes to whoever waits
        told = f"{type(error).__name__}: {str(error).strip()[:600]}"
        (folder / "error").write_text(told, encoding="utf-8")
        raise


def _make_onnx(checkpoint: Path, size: dict[str, int]) -> None:
    library: Any = importlib.import_module("ultralytics")
    # Statistics to its makers and all integrations; the file lies in this process's own folder.
    switches = {name: False for name, value in library.settings.items() if value is True}
    library.settings.update(switches)
    model = library.YOLO(checkpoint)
    if any(type(layer).__name__ == "ImagePoolingAttn" for layer in model.model.modules()):
        raise ValueError("YOLO-World of the first version can't be exported; take a -worldv2 one")
    model.export(format="onnx", dynamic=True, simplify=False, device="cpu", **size)


if __name__ == "__main__":
    main(*sys.argv[1:])
