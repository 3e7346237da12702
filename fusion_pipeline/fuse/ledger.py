"""A budget that is never exceeded: the most a request can cost is set aside before it goes out."""

import asyncio
from collections import deque
from collections.abc import Callable

from pydantic import Field

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.errors import FusionError


class BudgetError(FusionError):
    """What is left of the budget does not pay for one more request. Stops the run."""


class Prices(ConfigModel):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    """Dollars per million tokens of prompts."""
    output: float = Field(ge=0)
    """Dollars per million tokens of answers."""

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


class Ledger:
    """Of one event loop. `spent`: dollars so far, asked for again each time."""

    def __init__(self, budget: float | None, spent: Callable[[], float]) -> None:
        self._budget = budget
        self._spent = spent
        self._reserved = 0.0
        self._in_flight = 0
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    async def reserve(self, dollars: float) -> None:
        """Waits, first come first served, until what is in flight has left enough.

        Raises BudgetError when it never will.
        """
        granted = asyncio.get_running_loop().create_future()
        self._waiting.append((dollars, granted))
        self._serve()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release(dollars)
            raise

    def release(self, dollars: float) -> None:
        """Of a reservation whose cost, if any, is among what is spent now."""
        self._reserved -= dollars
        self._in_flight -= 1
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            dollars, granted = self._waiting[0]
            if granted.done():  # given up
                self._waiting.popleft()
            elif self._fits(dollars):
                self._waiting.popleft()
                self._reserved += dollars
                self._in_flight += 1
                granted.set_result(None)
            elif not self._in_flight:
                self._waiting.popleft()
                granted.set_exception(self._used_up(dollars))
            else:
                return

    def _fits(self, dollars: float) -> bool:
        if self._budget is None:
            return True
        return self._spent() + self._reserved + dollars <= self._budget

    def _used_up(self, dollars: float) -> BudgetError:
        return BudgetError(
            f"the budget of ${self._budget:,.2f} is used up: ${self._spent():,.4f} are spent, and "
            f"one more caption may cost ${dollars:,.4f}. What was answered is kept; raise "
            "`budget_dollars` and run again to go on."
        )
