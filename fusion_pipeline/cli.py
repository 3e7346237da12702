"""The `fusion` command: one function a subcommand, no logic."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fusion_pipeline.cli_job import (
    AsJson,
    ConfigFile,
    Limit,
    NoRay,
    Overrides,
    Overwrite,
    Refresh,
    RetryFailed,
    run_job,
)
from fusion_pipeline.cli_meta import meta
from fusion_pipeline.errors import FusionError, printable

if TYPE_CHECKING:  # imported inside the commands: `fusion --help` is to answer at once
    from fusion_pipeline.dataset.accounting import TableCounts
    from fusion_pipeline.dataset.verify import Problem
    from fusion_pipeline.doctor import Check
    from fusion_pipeline.pipeline import Pipeline
    from fusion_pipeline.status import TableState

app = typer.Typer(
    help="Perceptual fusion: web image-text pairs in, detailed captions that rest on evidence out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(meta, name="meta")


def _version(asked: bool) -> None:
    if asked:
        from fusion_pipeline import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None: ...


console = Console(stderr=True)
"""Progress and messages; standard output is for results."""


@app.command(epilog="Example: fusion run configs/quickstart.yaml select.clusters=12 --limit 100")
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="STEP",
            help="Run this step alone: a table of `fusion status`, centroids, export, report.",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STEP", help="Run up to this step, itself included.")
    ] = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
    retry_failed: RetryFailed = False,
    in_process: NoRay = False,
) -> None:
    """Run what is missing. The same command again resumes."""
    from fusion_pipeline.runner import Options

    pipeline = _pipeline(config, overrides)
    options = Options(only, until, limit, overwrite, refresh, retry_failed, in_process)
    runner = run_job(pipeline, options, console)
    if not runner.committed:
        console.print("Nothing to do: every step is complete.")
    for line in pipeline.outputs():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    _tell_failures(runner.failures())


@app.command(epilog="Example: fusion caption configs/quickstart.yaml --where \"status = 'failed'\"")
def caption(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of caption.engines, or composer.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL",
            help="Ask again for the captions for which this holds, and for nothing else: over key, "
            "status, reason, caption, finish, violations (JSON), repairs. At temperature 0 a model "
            "may well answer the same: other settings (a larger max_tokens) are another entry of "
            "caption.engines, with a table of its own.",
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what it would cost; ask nothing.")
    ] = False,
    limit: Limit = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
    retry_failed: RetryFailed = False,
    in_process: NoRay = False,
) -> None:
    """Run what is missing up to the captions, or ask again for some of them. The same command again
    resumes."""
    from fusion_pipeline import captioning
    from fusion_pipeline.runner import Options

    if where is not None and (overwrite or refresh or retry_failed):
        _fail("--where goes without --overwrite, --refresh and --retry-failed")
    chosen = [f"caption.engine={json.dumps(engine)}"] if engine else []
    pipeline = _pipeline(config, [*(overrides or ()), *chosen])
    table = pipeline.export.captions
    options = Options(None, table, limit, overwrite, refresh, retry_failed, in_process, where)
    if estimate:
        asked = captioning.ask_again(pipeline, where, limit) if where is not None else options.redo
        for line in captioning.estimate(pipeline, asked, options.replace, limit).lines():
            print(printable(line))
        return
    runner = run_job(pipeline, options, console)
    if not runner.committed:
        console.print("Nothing to do: no caption is asked for.")
    _tell_failures(runner.failures())


@app.command(epilog="Example: fusion status configs/quickstart.yaml --json")
def status(
    config: ConfigFile,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of every file, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The funnel: rows of every table by status and reason, and what is out of date. With --verify
    exit status 1 when a file is damaged."""
    from fusion_pipeline.dataset.layout import Dataset
    from fusion_pipeline.status import export_state, stale_artifacts, table_states

    pipeline = _pipeline(config, overrides)
    Dataset.open(pipeline.pool.storage.url)  # a mistyped `run` is an error, not an empty table
    states = {
        "pool": table_states(pipeline, pipeline.pool),
        "selected": table_states(pipeline, pipeline.selected),
    }
    stale, exported = stale_artifacts(pipeline), export_state(pipeline)
    problems = _verify(pipeline) if verify else []
    if as_json:
        found = {name: [state.as_dict() for state in rows] for name, rows in states.items()}
        more: dict[str, object] = {"stale_artifacts": stale, "export": exported}
        if verify:
            more["problems"] = [vars(problem) for problem in problems]
        _print_json({**found, **more})
    else:
        for name, rows in states.items():
            _print_states(name, rows)
        _print_export(exported)
        for name in stale:
            console.print(f"{name}: its inputs changed since (--refresh makes it anew)")
        for problem in problems:
            text = escape(printable(f"{problem.path}: {problem.what}; {problem.fix}"))
            console.print(f"[red bold]problem:[/] {text}", soft_wrap=True, highlight=False)
        if verify and not problems:
            console.print("Every file is whole.")
    if any(not problem.is_harmless for problem in problems):
        raise typer.Exit(1)


def _print_states(name: str, states: "list[TableState]") -> None:
    table = Table("table", title=name, title_justify="left")
    for heading in ("shards", "rows", "ok"):
        table.add_column(heading, justify="right")
    table.add_column("filtered and failed, by reason")
    for state in states:
        row = state.counts
        reasons = [f"{n:>6,}  {escape(why)}" for why, n in row.not_ok()]
        if state.other_settings:
            reasons.append("[yellow]made with other settings (--overwrite makes it anew)[/]")
        if state.stale:
            reasons.append(f"[yellow]stale: {state.stale} shards (--refresh makes them anew)[/]")
        if state.pending:
            reasons.append(f"[yellow]pending: {state.pending} shards[/]")
        table.add_row(
            row.table, str(row.shards), f"{row.rows:,}", f"{row.ok:,}", "\n".join(reasons)
        )
    Console().print(table)


def _print_export(exported: Mapping[str, Any]) -> None:
    if exported["state"] == "missing":
        Console().print("export: not made yet")
        return
    told = {"blurred": "of them blurred", "withheld": "more withheld by blur",
            "unwanted": "more left out by export.where"}  # fmt: skip
    parts = [f"export: {exported['samples']:,} samples"]
    parts += [f"{exported[name]:,} {words}" for name, words in told.items() if exported[name]]
    if exported["state"] == "outdated":
        parts.append("[yellow]outdated: its tables or rules have changed since[/]")
    Console().print("; ".join(parts), highlight=False)


def _verify(pipeline: "Pipeline") -> "list[Problem]":
    from rich.progress import track

    from fusion_pipeline.dataset.verify import verify

    found = []
    for dataset in (pipeline.pool, pipeline.selected):
        if dataset.exists:
            items = track(verify(dataset), "checking …", console=console, transient=True)
            found += [problem for problem in items if problem is not None]
    return found


@app.command(epilog="Example: fusion report configs/quickstart.yaml")
def report(config: ConfigFile, overrides: Overrides = None) -> None:
    """Write the HTML report anew."""
    from fusion_pipeline.dataset.layout import Dataset

    pipeline = _pipeline(config, overrides)
    Dataset.open(pipeline.pool.storage.url)  # a mistyped `run` is an error, not an empty page
    made = pipeline.report()
    made.run()
    print(made.out.full("report.html"))


@app.command(epilog="Example: fusion compare configs/quickstart.yaml composer gpt-4o --cards 40")
def compare(
    config: ConfigFile,
    a: Annotated[str, typer.Argument(metavar="A", help="An engine: its table is captions/A.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another engine.")],
    overrides: Overrides = None,
    cards: Annotated[int, typer.Option(min=0, help="Samples shown side by side.")] = 24,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="The page; default: run/compare-A-B.html")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Two engines' captions of the same samples side by side: numbers, and a page to look at."""
    from fusion_pipeline.report.compare import Compare, default_page, write_page
    from fusion_pipeline.report.compare_blocks import terminal_tables

    pipeline = _pipeline(config, overrides)
    compared = Compare.of(pipeline, a, b)
    with console.status("comparing …"):
        comparison, chosen = compared.run(cards)
    page = out or default_page(pipeline.config.run, a, b)
    write_page(comparison, chosen, Path(pipeline.config.run).name, page)
    if as_json:
        _print_json({**comparison.as_dict(), "page": page})
        return
    for table in terminal_tables(comparison):
        Console().print(table)
    print(page)


@app.command(epilog="Example: fusion migrate runs/quickstart")
def migrate(
    folder: Annotated[str, typer.Argument(help="A `run` folder, or one dataset of it.")],
) -> None:
    """Bring datasets of an older fusion into the present format. Nothing is computed again."""
    from fusion_pipeline.dataset import migrations
    from fusion_pipeline.dataset.layout import FORMAT_VERSION

    for root in migrations.find_datasets(folder):
        with console.status(f"{root} …"):
            found = migrations.migrate(root)
        done = f"format version {found} -> {FORMAT_VERSION}" if found < FORMAT_VERSION else (
            f"has format version {found}: nothing to do"
        )  # fmt: skip
        print(f"{root}: {done}")


@app.command("demo-data", epilog="Example: fusion demo-data runs/demo-data --seed 1")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="Gets shards/*.tar and truth.json.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other data.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a small LAION-like WebDataset, offline: photos, rendered text, copies, broken files."""
    from dataclasses import asdict

    try:
        from fusion_pipeline.demo import make_demo_data

        summary = asdict(make_demo_data(folder, seed))
    except ModuleNotFoundError as error:
        _fail(f"demo data needs {error.name}: pip install 'fusion-pipeline[demo]'")
    if as_json:
        _print_json(summary)
        return
    console.print(
        f"{summary['rows']} rows in {summary['tars']} tars, "
        f"{summary['bytes'] / 1e6:.0f} MB: {folder}"
    )


@app.command("config", epilog="Example: fusion config configs/quickstart.yaml select.clusters=12")
def show_config(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The resolved configuration, every default included."""
    from fusion_pipeline.config import load_config

    loaded = load_config(config, overrides or ())
    if as_json:
        _print_json(loaded.to_plain())
    else:
        print(loaded.to_yaml(), end="")


@app.command("settings", epilog="Example: fusion settings select, fusion settings experts.owlv2")
def show_settings(
    prefix: Annotated[str, typer.Argument(help="Those that begin like this; by default all.")] = "",
    as_json: AsJson = False,
) -> None:
    """Every setting of a config: what it means, what it may be, and its default."""
    from dataclasses import asdict

    from fusion_pipeline.settings import settings

    found = [one for one in settings() if one.name.startswith(prefix)]
    if not found:
        _fail(f"no setting begins with {prefix!r}; `fusion settings` lists all")
    if as_json:
        _print_json([asdict(one) for one in found])
        return
    for one in found:
        default = "must be given" if one.default is None else f"default {one.default}"
        text = Text.assemble((one.name, "bold"), f"  {one.values}, ", (default, "green"))
        Console().print(text, soft_wrap=True)
        Console().print(Padding(Text(one.meaning), (0, 0, 0, 4)))


@app.command(epilog="Example: fusion doctor configs/quickstart.yaml --smoke")
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Checks what this config needs, too.")
    ] = None,
    overrides: Overrides = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Show known photos to the config's experts and engine."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is here, what is missing, and how to get it. Exit status 1 when something is missing,
    or when the experts or the caption engine fail in a smoke test."""
    from fusion_pipeline.doctor import examine

    pipeline = _pipeline(config, overrides) if config else None
    if smoke and pipeline is None:
        _fail("--smoke needs a config: fusion doctor CONFIG --smoke")
    checks = examine(pipeline)
    wrong = any(check.state == "missing" for check in checks)
    plain = [check.as_dict() for check in checks]
    if not as_json:
        _print_checks(checks)
    elif not smoke:
        _print_json(plain)
    if smoke and pipeline is not None:
        from fusion_pipeline.smoke import shown, try_photos

        with console.status("photos …") as status:
            cards = try_photos(pipeline.config, status.update)
        wrong = wrong or any(card.problems for card in cards)
        if as_json:
            _print_json({"checks": plain, "smoke": [card.as_dict() for card in cards]})
        else:
            out = Console(highlight=False)
            for part in shown(cards):  # cards fold to the width, messages stay one line each
                out.print(part, soft_wrap=isinstance(part, Text))
    if wrong:
        raise typer.Exit(1)


def _print_checks(checks: "list[Check]") -> None:
    out = Console(highlight=False, soft_wrap=True)
    marks = {
        "ok": "[green]ok     [/]",
        "warn": "[yellow]warning[/]",
        "missing": "[red]missing[/]",
    }
    for check in checks:
        out.print(f"{marks[check.state]}  {check.name:<24} {escape(check.found)}")
        if check.fix:
            out.print(f"{'':9}{'':<24} -> {escape(check.fix)}")


def _tell_failures(tables: "list[TableCounts]") -> None:
    """Name what failed, and how to do it again; exit status 1 when a step gave nothing at all."""
    for table in tables:
        reasons = ", ".join(f"{n:,} {why.partition(':')[2]}" for why, n in table.not_ok()
                            if why.startswith("failed"))  # fmt: skip
        failed, tried = table.total("failed"), table.total("failed") + table.ok
        text = escape(printable(f"{table.table}: {failed:,} of {tried:,} rows ({reasons})"))
        fix = "mend the cause, then run again with --retry-failed"
        console.print(f"[red bold]failed:[/] {text}; {fix}", soft_wrap=True, highlight=False)
    if any(not table.ok for table in tables):
        raise typer.Exit(1)


def _pipeline(config: Path, overrides: list[str] | None) -> "Pipeline":
    from fusion_pipeline.config import load_config
    from fusion_pipeline.pipeline import build_pipeline

    return build_pipeline(load_config(config, overrides or ()))


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _fail(message: str) -> NoReturn:
    text = escape(printable(message))
    console.print(f"[red bold]error:[/] {text}", soft_wrap=True, highlight=False)
    sys.exit(1)


def main() -> None:
    """Entry point: known errors become one message and exit status 1, others keep their trace."""
    try:
        app()
    except FusionError as error:
        _fail(str(error))
