"""What people and programs are told of batches."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from fusion_pipeline.fuse.base import CaptionFailed
from fusion_pipeline.fuse.batch.books import Books, Entry, State
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.desk import Sent
from fusion_pipeline.fuse.batch.remote import ACCOUNT_CODES
from fusion_pipeline.fuse.batch.results import CONFIG_CODES


def state_of(entry: Entry) -> str:
    """In one word or two: what the provider says while it is at work, what came of it later."""
    if entry.state is State.OPEN:
        return f"{entry.status}, not collected" if entry.ended else entry.status or "open"
    if entry.state is State.SETTLED and entry.batch is None:
        return "answered" if entry.counts.get("answered") else "not sent"
    if entry.state is State.SETTLED and entry.status:
        return entry.status
    return str(entry.state)


def sent_line(sent: Sent, is_elsewhere: bool, books: Books, is_retry: bool = False) -> list[str]:
    """What `submit` did."""
    requests = sum(entry.requests for entry in sent.entries)
    done = "written" if is_elsewhere else "sent"
    lines = [f"{requests:,} requests in {len(sent.entries):,} files {done}"]
    if is_elsewhere:
        place = books.dataset.storage
        lines += [place.full(books.path(e.name, "requests.jsonl")) for e in sent.entries]
    if sent.refused:
        lines.append(f"{sent.refused:,} requests can't be sent: their rows will have failed")
    if sent.left_out:
        lines.append(
            f"{sent.left_out:,} requests are left out: the budget, or the limit of enqueued "
            "tokens, has no room for them now. "
            + ("`submit --retry-failed` again" if is_retry else "Submit again")
            + " when batches have been collected, or raise the limit."
        )
        lines += _excess_line(books)
    return lines


def _excess_line(books: Books) -> list[str]:
    if not books.excess:
        return []
    entry = max(books.entries.values(), key=lambda entry: entry.excess)
    path = books.dataset.storage.full(books.path(entry.name, "state.json"))
    return [
        f"{books.excess:,} tokens more than `image_tokens` are set aside for each request, because "
        f"an answer counted {entry.excess:,} more than was thought to be the most. If it was wrong "
        f"to, set `excess` to 0 in {path}"
    ]


def notes(entries: Collection[Entry], read: Mapping[str, int]) -> list[str]:
    """What is to be changed, by what was settled now: codes of batches that were refused as a
    whole, and of requests that all others would fail with. `read`: counts of further results."""
    lines = []
    for code, count in Counter(entry.code for entry in entries if entry.code).items():
        lines.append(f"{count:,} batches were refused as a whole: {_with_advice(code)}")
    counts = Counter(read)
    for entry in entries:
        counts.update(entry.counts)
    for code, advice in CONFIG_CODES.items():
        if counts[code]:
            lines.append(
                f"{counts[code]:,} requests have failed, {code}: {advice}. "
                "`submit --retry-failed` asks for them again with the same settings"
            )
    return lines


def _with_advice(code: str) -> str:
    return f"{code} ({ACCOUNT_CODES[code]})" if code in ACCOUNT_CODES else code


def files_table(books: Books) -> Table:
    """A row for each file, those without a batch left out."""
    table = Table(title=books.table, title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("state")
    for heading in ("requests", "MB", "dollars"):
        table.add_column(heading, justify="right")
    table.add_column("results")
    for entry in books.entries.values():
        counts = ", ".join(f"{name} {count:,}" for name, count in entry.counts.items())
        why = f"refused: {_with_advice(entry.code)}" if entry.code else ""
        table.add_row(
            escape(entry.name),
            state_of(entry),
            f"{entry.requests:,}",
            f"{entry.bytes / 1e6:,.1f}",
            f"≤ {entry.most:,.2f}" if entry.is_open else f"{entry.dollars:,.2f}",
            "; ".join(filter(None, [escape(why), counts])),
        )
    return table


def panel(books: Books, config: BatchConfig, unsent: int, waiting: int) -> Panel:
    """Batches by state, requests, outcomes, dollars so far. `waiting`: shards."""
    grid = Table.grid(padding=(0, 2))
    for name, value in summary(books, config, unsent, waiting).items():
        if value not in (None, {}):
            grid.add_row(name, _shown(value))
    return Panel(grid, title=books.table, title_align="left", expand=False)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def summary(books: Books, config: BatchConfig, unsent: int, waiting: int) -> dict[str, Any]:
    outcomes = Counter(
        outcome.reason if isinstance(outcome, CaptionFailed) else outcome.finish.value
        for outcome in books.outcomes.values()
    )
    return {
        "files": dict(Counter(state_of(entry) for entry in books.entries.values())),
        "requests in open files": len(books.in_flight()),
        "requests to be sent": unsent,
        "shards that wait": waiting,
        "outcomes": dict(outcomes.most_common()),
        "dollars so far": books.dollars,
        "dollars in open files, at most": books.most,
        "budget": config.budget_dollars,
    }


def as_dict(books: Books, config: BatchConfig, unsent: int, waiting: int) -> dict[str, Any]:
    entries = [entry.model_dump(mode="json") for entry in books.entries.values()]
    return {"table": books.table, **summary(books, config, unsent, waiting), "entries": entries}
