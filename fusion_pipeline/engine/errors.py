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


def _kind(error: BaseException) -> type[StageError]:
    """By name: torch, vLLM and ONNX Runtime have classes of their own and need not be here."""
    if isinstance(error, MemoryError):
        return HostMemoryError
    text = str(error).lower()
    if type(error).__name__ == "OutOfMemoryError" or "cuda out of memory" in text:
        return DeviceMemoryError
    if "cuda error" in text or "cuda failure" in text:
        return DeviceError
    return StageError
