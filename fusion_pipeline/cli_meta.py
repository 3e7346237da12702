"""The `fusion meta` commands: the captions that a strong model writes for a part of the images."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fusion_pipeline.cli_job import ConfigFile, NoRay, Overrides, Overwrite, Refresh, run_job
from fusion_pipeline.errors import FusionError, printable

if TYPE_CHECKING:  # imported inside the commands: `fusion --help` is to answer at once
    from fusion_pipeline.fuse.batch.desk import Desk
    from fusion_pipeline.fuse.batch.plan import Plan
    from fusion_pipeline.pipeline import Pipeline

console = Console(stderr=True)

meta = typer.Typer(
    help="The meta set: captions of a part of the images by a strong model.", no_args_is_help=True
)


@meta.command(
    epilog="Example: fusion meta sample configs/quickstart.yaml 'caption.sample={size: 50}'"
)
def sample(
    config: ConfigFile,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    refresh: Refresh = False,
    in_process: NoRay = False,
) -> None:
    """Draw the images to caption: run what is missing up to `meta_sample`; what was drawn."""
    from fusion_pipeline.config import ConfigError, load_config
    from fusion_pipeline.pipeline import build_pipeline
    from fusion_pipeline.runner import Options
    from fusion_pipeline.select.meta_sample import drawn_strata, read_drawn

    pipeline = build_pipeline(load_config(config, overrides or ()))
    if pipeline.sample is None:
        raise ConfigError(
            f"{config}: caption.sample is not set, so all images are captioned: set it to "
            "{size: 100000}"
        )
    until = pipeline.sample.name
    options = Options(until=until, overwrite=overwrite, refresh=refresh, in_process=in_process)
    run_job(pipeline, options, console)
    print(f"{until}: {read_drawn(pipeline.selected)}")
    names = {True: "with text", False: "without text", None: "nobody looked for text"}
    for has_text, (rows, clusters) in sorted(drawn_strata(pipeline.selected).items(), key=str):
        print(f"{names[has_text]}: {rows:,} rows of {clusters:,} clusters")


# Captions in batches


@meta.command(epilog="Example: fusion meta submit configs/quickstart.yaml --files-only")
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    files_only: Annotated[
        bool,
        typer.Option(
            "--files-only", help="Write the files and upload nothing: for vllm run-batch."
        ),
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask for captions that failed once more, too.")
    ] = False,
) -> None:
    """Ask for the captions that are missing, in batches. Nothing is submitted twice: the same
    command again sends what was left out and what came back without an answer."""
    from functools import partial

    from rich.progress import track

    from fusion_pipeline.engine.chain import Replace
    from fusion_pipeline.fuse.batch import show

    with _batches(config, overrides) as (_, plan, desk):
        # Raises FusionError: nothing is to be paid for a table that can't be made.
        plan.chain.outdated(Replace.NOTHING)
        problem = None
        if not files_only:
            with console.status("batches …"):
                problem = _take_in(desk)
        if retry_failed:
            desk.books.forgive()
            plan = plan.of_failed()
        bar = partial(track, description="requests …", console=console, transient=True)
        sent = desk.submit(plan, files_only, bar)
        _say(show.sent_line(sent, files_only, desk.books, retry_failed))
        _say(show.notes([*desk.settled, *sent.entries], {}))
        if problem is not None:
            raise problem


@meta.command(epilog="Example: fusion meta status configs/quickstart.yaml --json")
def status(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a program to read.")
    ] = False,
) -> None:
    """How far the batches are, what they cost, and what is still to be sent. Changes nothing."""
    from fusion_pipeline.fuse.batch import show

    with _batches(config, overrides, is_reading=True) as (_, plan, desk):
        with console.status("batches …"):
            desk.look()
            unsent, waiting = plan.unsent(), len(plan.shards())
        if as_json:
            found = show.as_dict(desk.books, desk.config, unsent, waiting)
            print(json.dumps(found, indent=1, ensure_ascii=False))
            return
        out = Console(highlight=False)
        out.print(show.files_table(desk.books))
        out.print(show.panel(desk.books, desk.config, unsent, waiting))


@meta.command(epilog="Example: fusion meta collect configs/quickstart.yaml --results out.jsonl")
def collect(
    config: ConfigFile,
    overrides: Overrides = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Results of files that were run elsewhere; may be given several times.",
        ),
    ] = None,
) -> None:
    """Take in what the batches have answered; commit the shards whose captions are all there."""
    from fusion_pipeline.fuse.batch import show
    from fusion_pipeline.runner import Options

    with _batches(config, overrides) as (pipeline, plan, desk), console.status("results …"):
        problem = _take_in(desk)
        read = desk.take_files(results) if results else {}
        healed = plan.has_healed()
    if results:
        found = ", ".join(f"{name} {count:,}" for name, count in read.items() if count)
        console.print(f"results: {found or 'none'}", highlight=False)
    _say(show.notes(desk.settled, read))
    options = Options(only=plan.step.work.name, retry_failed=healed, in_process=True)
    run_job(pipeline, options, console)
    unsent, waiting = plan.unsent(), len(plan.shards())
    Console(highlight=False).print(show.panel(desk.books, desk.config, unsent, waiting))
    if problem is not None:
        raise problem


@meta.command(epilog="Example: fusion meta cancel configs/quickstart.yaml")
def cancel(config: ConfigFile, overrides: Overrides = None) -> None:
    """Cancel the batches that are at work. `collect` takes in what they had answered by then."""
    with _batches(config, overrides) as (_, _, desk):
        with console.status("batches …"):
            desk.look()
            done = desk.cancel()
        said = ", ".join(f"{count:,} {what}" for what, count in done.items())
        console.print(f"files: {said or 'none is open'}", highlight=False)


def _take_in(desk: "Desk") -> FusionError | None:
    """What the batches have answered. Returned is why some could not be read: to be raised when all
    is done that can be done without them."""
    from fusion_pipeline.fuse.batch.client import BatchError

    desk.look()
    try:
        desk.take_in()
    except BatchError as error:
        return error
    return None


def _say(lines: list[str]) -> None:
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _batches(
    config: Path, overrides: list[str] | None, is_reading: bool = False
) -> "Iterator[tuple[Pipeline, Plan, Desk]]":
    """The captions step and its books, under the lease unless they are only read. Raises
    FusionError."""
    from fusion_pipeline.captioning import caption_step
    from fusion_pipeline.config import ConfigError, load_config
    from fusion_pipeline.dataset.layout import Dataset
    from fusion_pipeline.dataset.lease import as_holder, hold_lease
    from fusion_pipeline.engine.chain import Chain
    from fusion_pipeline.engine.run import new_run_id
    from fusion_pipeline.fuse.batch.desk import Desk
    from fusion_pipeline.fuse.batch.plan import Plan
    from fusion_pipeline.pipeline import build_pipeline

    pipeline = build_pipeline(load_config(config, overrides or ()))
    step, stage = caption_step(pipeline)
    settings, books = stage.engine.batch, stage.engine.books
    if settings is None or books is None:
        raise ConfigError(
            f"{config}: caption.engine is not asked in batches: set it to {{batch: {{model: ...}}}}"
        )
    dataset = Dataset.open(pipeline.selected.storage.url)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, books, "token", "")
        if not is_reading:
            books.token = stack.enter_context(hold_lease(dataset.storage, new_run_id()))
            stack.enter_context(as_holder(dataset.storage, books.token))
        # Under the lease: until then another run may make new versions of what the step reads.
        chain = Chain.resolve(dataset, [step])
        desk = Desk(books.load(), settings)
        stack.callback(desk.close)
        try:
            yield pipeline, Plan(chain, settings, books), desk
        except KeyboardInterrupt:
            console.print("Interrupted. All that was sent is in the books; run it again to go on.")
            raise typer.Exit(130) from None
