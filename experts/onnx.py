"""ONNX Runtime sessions that use the threads they are given and no more."""

from pathlib import Path

import onnxruntime as ort

from experts.base import Hardware
from experts.checkpoint import CheckpointError

_CUDA = "CUDAExecutionProvider"


def session(path: Path, hardware: Hardware) -> ort.InferenceSession:
    """On the GPU if the hardware has one, else on the CPU. Raises CheckpointError when a GPU was
    asked for and ONNX Runtime can't use it."""
    return _gpu_session(path) if hardware.gpu else cpu_session(path, hardware.threads)


def cpu_session(model: Path | bytes, threads: int) -> ort.InferenceSession:
    """A CPU session of `threads` threads, silent but for fatal errors. `model`: a file, or what
    such a file holds.

    Operators run one after another, and idle threads sleep instead of spinning: on a machine
    where every core runs a worker, a spinning thread is a core taken from another model.
    """
    graph = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(
        graph, sess_options=_options(threads), providers=["CPUExecutionProvider"]
    )


def _gpu_session(path: Path) -> ort.InferenceSession:
    if _CUDA in ort.get_available_providers():
        ort.preload_dlls()  # CUDA and cuDNN out of NVIDIA's wheels
        # Exhaustive search, the default, would be made again for each new shape of input.
        providers = [(_CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"]
        made = ort.InferenceSession(str(path), sess_options=_options(1), providers=providers)
        # Where CUDA can't be loaded, it falls back to the CPU and only warns.
        if _CUDA in made.get_providers():
            return made
    raise CheckpointError(
        "the config gives this expert a GPU, and ONNX Runtime can't use one: install "
        "onnxruntime-gpu in place of onnxruntime, with the CUDA and cuDNN that its version needs "
        "(pip install 'onnxruntime-gpu[cuda,cudnn]'), or set `gpus: 0`"
    )


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
