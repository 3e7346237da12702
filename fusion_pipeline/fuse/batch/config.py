"""Settings of captions that are asked for in batches."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from fusion_pipeline.fuse.completions import CompletionConfig
from fusion_pipeline.fuse.endpoint import base_url
from fusion_pipeline.fuse.ledger import Prices


class BatchConfig(CompletionConfig):
    """Where batches go, how large they may be, and what they may cost."""

    url: Annotated[str, AfterValidator(base_url)] = "https://api.openai.com/v1"
    """Base URL of an API with `/files` and `/batches`."""
    key_env: str | None = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key, or that with `_FILE` added to its name names a file
    which does; null for a server that asks for none."""
    max_requests: int = Field(default=50_000, ge=1)
    """Of one file."""
    max_file_mb: float = Field(default=200, gt=0, le=1000, allow_inf_nan=False)
    """Of one file, in millions of bytes."""
    enqueued_tokens: int | None = Field(default=None, ge=1)
    """The most prompt tokens that unfinished batches may hold: a limit of your account. Null: what
    the provider refuses for that reason is sent again by the next `submit`."""
    window: str = Field(default="24h", pattern=r"^[1-9][0-9]{0,3}[hd]$")
    """Within which a batch is to be completed."""
    prices: Prices | None = None
    """Dollars per million tokens, of batches: `{input: 1.25, output: 5}`."""
    budget_dollars: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The most that the captions of this engine may cost, over all batches."""
    image_tokens: int = Field(default=3000, ge=0)
    """The most prompt tokens that an image counts; set aside with each request, so too much is safe
    and too little is not."""

    @model_validator(mode="after")
    def _payable(self) -> Self:
        if self.budget_dollars is not None and self.prices is None:
            raise ValueError("budget_dollars: prices are needed to keep it")
        return self

    @property
    def max_file_bytes(self) -> int:
        return int(self.max_file_mb * 1e6)

    @property
    def window_s(self) -> float:
        return int(self.window[:-1]) * (3600.0 if self.window.endswith("h") else 86_400.0)

    def fingerprint_fields(self) -> dict[str, Any]:
        """The fields that change captions."""
        return self.completion_fields()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars; without prices all is free."""
        if self.prices is None:
            return 0.0
        return self.prices.cost(prompt_tokens, completion_tokens)
