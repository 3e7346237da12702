"""ONNX Runtime sessions that use the threads they are given and no more."""

from pathlib import Path

import onnxruntime as ort


def cpu_session(path: Path, threads: int) -> ort.InferenceSession:
    """A CPU session of `threads` threads, silent but for fatal errors.

    Operators run one after another, and idle threads sleep instead of spinning: on a machine
    where every core runs a worker, a spinning thread is a core taken from another model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
