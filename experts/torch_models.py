"""What experts that run on PyTorch share: device, number format, threads, loading."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import model_validator

from experts.base import Hardware
from experts.checkpoint import CheckpointConfig, CheckpointError


def require(extra: str, *packages: str) -> None:
    """For the validator of a config: asks for the extra that brings `packages`, without importing
    them. Raises ValueError."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'fusion-pipeline[{extra}]'")


class TransformersConfig(CheckpointConfig):
    """Base of the settings of experts that load a transformers checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _is_installed(cls, settings: Any) -> Any:
        require("transformers", "torch", "transformers")
        return settings


def use_threads(hardware: Hardware) -> None:
    """As many threads as the worker was given; more than one worker shares the machine."""
    import torch

    torch.set_num_threads(hardware.threads)


def device_of(hardware: Hardware) -> str:
    """`cuda` or `cpu`. Raises CheckpointError when a GPU was asked for and PyTorch sees none."""
    import torch

    if not hardware.gpu:
        return "cpu"
    if not torch.cuda.is_available():
        raise CheckpointError(
            "the config gives this expert a GPU, and PyTorch sees none: its build may be for CPUs "
            "or for another CUDA version (python -m torch.utils.collect_env), or set `gpus: 0`"
        )
    return "cuda"


def load_model(auto_class: Any, folder: Path, config: CheckpointConfig, hardware: Hardware) -> Any:
    """The model of a transformers checkpoint on its device, ready to be asked. `auto_class`: one of
    transformers' `AutoModel…` classes.

    Raises CheckpointError for weights that don't fill the model.
    """
    import torch
    from transformers.utils import logging

    use_threads(hardware)
    logging.disable_progress_bar()  # of many workers at a time
    model, report = auto_class.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=getattr(torch, config.dtype),
        output_loading_info=True,
    )
    # transformers fills what a checkpoint lacks with random numbers, and only warns.
    # Batch normalisation's counter matters in training only, and conversions leave it out.
    missing = sorted(k for k in report["missing_keys"] if not k.endswith("num_batches_tracked"))
    if missing:
        raise CheckpointError(
            f"{config.model}: {len(missing)} weights of {type(model).__name__} are not in it, such "
            f"as {missing[0]}: a checkpoint of another kind?"
        )
    return model.to(device_of(hardware)).eval()
