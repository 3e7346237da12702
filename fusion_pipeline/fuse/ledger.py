"""A budget that is never exceeded: the most a request can cost is set aside before it goes out."""

import asyncio
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from fusion_pipeline.errors import FusionError


class BudgetError(FusionError):
    """What is left of the budget does not pay for one more request. Stops the run."""


class Prices(BaseModel):
    """US dollars per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


class Ledger:
    """Of one event loop. `spent`: dollars so far, asked for again each time."""

    def __init__(self, budget: float | None, spent: Callable[[], float]) -> None:
        self._budget = budget
        self._spent = spent
        self._reserved = 0.0
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def reserve(self, dollars: float) -> None:
        """Waits until what is in flight has left enough. Raises BudgetError when it never will."""
        async with self._changed:
            while not self._fits(dollars):
                if not self._in_flight:
                    raise BudgetError(
                        f"the budget of ${self._budget:,.2f} is used up: ${self._spent():,.4f} are "
                        f"spent, and one more caption may cost ${dollars:,.4f}. What was answered "
                        "is kept; raise `budget_dollars` and run again to go on."
                    )
                await self._changed.wait()
            self._reserved += dollars
            self._in_flight += 1

    async def release(self, dollars: float) -> None:
        """Of a reservation whose cost, if any, is among what is spent now."""
        async with self._changed:
            self._reserved -= dollars
            self._in_flight -= 1
            self._changed.notify_all()

    def _fits(self, dollars: float) -> bool:
        if self._budget is None:
            return True
        return self._spent() + self._reserved + dollars <= self._budget
