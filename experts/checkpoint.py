"""Checkpoints in a folder or on the Hugging Face hub: pinned, and never a pickle.

Of a hub's repository only safetensors, configurations and vocabularies are fetched, at one commit;
code that a repository brings is never run.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from experts.base import ExpertConfig
from fusion_pipeline.dataset.weights import weights_hash
from fusion_pipeline.errors import FusionError

FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched of a repository: weights, configurations, vocabularies."""


def is_folder(source: str) -> bool:
    """Rather than an id on the hub."""
    return source.startswith((".", "/", "~")) or Path(source).is_dir()


class CheckpointError(FusionError):
    """A checkpoint that is not there, or that can't be used safely."""


class CheckpointConfig(ExpertConfig):
    """Base of the settings of experts that load a checkpoint."""

    model: str = Field(min_length=1)
    """A folder, or an id on the hub such as `google/owlv2-large-patch14-ensemble`."""
    revision: str | None = None
    """Commit of the hub's repository, 40 hex digits; none for a folder."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Images a call. 1 is best on CPUs; GPUs want more."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; float32 on CPUs."""

    @model_validator(mode="after")
    def _is_pinned(self) -> Self:
        if self.is_folder:
            if self.revision is not None:
                raise ValueError(f"revision: {self.model} is a folder and has none; leave it out")
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", self.model):
            raise ValueError(f"model: no folder {self.model!r}, and not an id like owner/name")
        elif not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"revision: there is no folder {self.model!r}; of the hub's repository of that "
                "name pin the commit, 40 hex digits, as shown on "
                f"huggingface.co/{self.model}/commits/main"
            )
        return self

    @property
    def is_folder(self) -> bool:
        return is_folder(self.model)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Without `model` and `revision`, which `checkpoint_revision` stands for: a checkpoint that
        is moved stays the same."""
        return self.model_dump(mode="json", exclude={"model", "revision"})


def checkpoint_revision(config: CheckpointConfig) -> str:
    """`<id>@<commit>`, or a hash of the folder's contents. Raises CheckpointError."""
    if config.is_folder:
        return "folder:" + weights_hash(_existing(config))
    return f"{config.model}@{config.revision}"


def checkpoint_folder(config: CheckpointConfig, files: Sequence[str] = FILES) -> Path:
    """Where the checkpoint lies, after it was fetched if need be. `HF_HUB_OFFLINE` and `HF_TOKEN`
    mean what they always mean.

    Raises CheckpointError.
    """
    if config.is_folder:
        folder = _existing(config)
    else:
        folder = fetch(config.model, str(config.revision), files)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{config.model}: no *.safetensors there. Other formats are pickles, which can run "
            "code, and are not loaded: convert it once, on a machine you can spare "
            "(huggingface.co/spaces/safetensors/convert)"
        )
    return folder


def fetch(repository: str, commit: str, files: Sequence[str]) -> Path:
    """The hub's files of these patterns, in a folder of its cache. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=[*files]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{repository} at {commit} can't be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error


def _existing(config: CheckpointConfig) -> Path:
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{config.model}: no such folder")
    return folder
