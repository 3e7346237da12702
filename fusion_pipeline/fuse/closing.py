"""What a captioning run says at its end: how fast, how the captions ended, what they cost."""

from collections import Counter

from rich.panel import Panel
from rich.table import Table

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.fuse.journal import Journal, Spent


class Meter:
    """Made before a captioning run. Only under the dataset's lease, and when no client is at work:
    the journal is folded up."""

    def __init__(self, journal: Journal, maximum: float | None = None) -> None:
        """`maximum`: captions a second that the engine was measured to make."""
        self._journal = journal
        self._maximum = maximum
        self._before = _read(journal)

    @property
    def table(self) -> str:
        return self._journal.table

    def panel(self, seconds: float) -> Panel:
        """`seconds`: that captions were asked for."""
        seconds = max(seconds, 1e-9)
        total = _read(self._journal)
        finish, violations, repairs = _ends(self._journal.dataset, self._journal.table)
        captions = finish.total()
        asked = total.requests - self._before.requests
        grid = Table.grid(padding=(0, 2))
        pace = f"{asked:,} in {seconds:,.0f} s: {asked / seconds:,.1f}/s"
        if self._maximum:
            share = asked / seconds / self._maximum
            pace += f", {share:.0%} of the engine's own maximum ({self._maximum:,.1f}/s)"
        grid.add_row("requests", pace)
        prompt = (total.prompt_tokens - self._before.prompt_tokens) / seconds
        output = (total.completion_tokens - self._before.completion_tokens) / seconds
        grid.add_row("tokens", f"prompts {prompt:,.0f}/s, answers {output:,.0f}/s")
        grid.add_row("captions", f"{captions:,}, ended by: {_listed(finish)}")
        grid.add_row("rules broken", _listed(violations))
        if repairs:
            grid.add_row("asked again", f"{repairs:,}")
        if total.dollars:
            now = total.dollars - self._before.dollars
            million = f"; {1e6 * total.dollars / captions:,.0f} a million" if captions else ""
            grid.add_row("dollars", f"{now:,.2f} this run, {total.dollars:,.2f} so far{million}")
        return Panel(grid, title=self._journal.table, title_align="left", expand=False)


def _read(journal: Journal) -> Spent:
    journal.start()
    return journal.spent


def _ends(dataset: Dataset, table: str) -> tuple[Counter[str], Counter[str], int]:
    """Why the captions ended, the rules that they break, and how often one was asked for again."""
    finish, violations, repairs = Counter[str](), Counter[str](), 0
    for _, captions in dataset.iterate(table):
        finish.update(reason for reason in captions["finish"].to_pylist() if reason)
        for broken in captions["violations"].to_pylist():
            violations.update(broken or ())
        repairs += sum(count or 0 for count in captions["repairs"].to_pylist())
    return finish, violations, repairs


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"
