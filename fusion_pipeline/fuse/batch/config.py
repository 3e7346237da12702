"""Settings of captions that are asked for in batches."""

from typing import Annotated

from pydantic import AfterValidator, Field

from fusion_pipeline.fuse.completions import PaidConfig
from fusion_pipeline.fuse.endpoint import base_url


class BatchConfig(PaidConfig):
    """Where batches go, and how large they may be. `prices` are those of batches."""

    url: Annotated[str, AfterValidator(base_url)] = "https://api.openai.com/v1"
    """Base URL of an API with `/files` and `/batches`."""
    max_requests: int = Field(default=50_000, ge=1)
    """Of one file."""
    max_file_mb: float = Field(default=200, gt=0, le=1000, allow_inf_nan=False)
    """Of one file, in millions of bytes."""
    enqueued_tokens: int | None = Field(default=None, ge=1)
    """The most prompt tokens that unfinished batches may hold: a limit of your account. Null: what
    the provider refuses for that reason is sent again by the next `submit`."""
    window: str = Field(default="24h", pattern=r"^[1-9][0-9]{0,3}[hd]$")
    """Within which a batch is to be completed."""

    @property
    def max_file_bytes(self) -> int:
        return int(self.max_file_mb * 1e6)

    @property
    def window_s(self) -> float:
        return int(self.window[:-1]) * (3600.0 if self.window.endswith("h") else 86_400.0)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars; without prices all is free."""
        if self.prices is None:
            return 0.0
        return self.prices.cost(prompt_tokens, completion_tokens)
