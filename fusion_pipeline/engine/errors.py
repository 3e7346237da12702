"""What can go wrong with a stage as a whole."""

import traceback

from fusion_pipeline.errors import FusionError


class StageError(FusionError):
    """A stage is broken (not one of its samples): the run stops."""


class StalledError(StageError):
    """Nothing comes from Ray any more."""


class ResourceError(StageError):
    """Memory or the device gave out. Says nothing of the images yet: the worker starts again."""


class HostMemoryError(ResourceError):
    """MemoryError."""


class DeviceMemoryError(ResourceError):
    """The GPU's memory is full: next time in smaller batches."""


class DeviceError(ResourceError):
    """A CUDA error, after which a process can't use its device any more."""


def broken(stage: str, what: str, error: BaseException) -> StageError:
    """An error that names the stage, the cause, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return _kind(error)(
        f"stage {stage!r} {what}: {type(error).__name__}: {error} "
        f"(raised at {frame.filename}:{frame.lineno})"
    )


def is_resource_error(error: BaseException) -> bool:
    """Whether an error says something of memory or the device, and nothing of the images."""
    return _kind(error) is not StageError


_DEVICE_MEMORY = ("cuda out of memory", "cuda driver error: out of memory")
_DEVICE = ("cuda error", "cuda failure", "cuda driver error", "cudnn error", "cublas error")


def _kind(error: BaseException) -> type[StageError]:
    """By name: torch, vLLM and ONNX Runtime have classes of their own and need not be here."""
    text = str(error).lower()
    # PyTorch on a CPU: "DefaultCPUAllocator: can't allocate memory: you tried to allocate ..."
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return HostMemoryError
    if type(error).__name__ == "OutOfMemoryError" or any(t in text for t in _DEVICE_MEMORY):
        return DeviceMemoryError
    if any(t in text for t in _DEVICE):
        return DeviceError
    return StageError
