"""What commands have in common: their arguments and options, and running a job."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # imported inside the commands: `fusion --help` is to answer at once
    from rich.console import Console

    from fusion_pipeline.pipeline import Pipeline
    from fusion_pipeline.runner import Options, Runner


ConfigFile = Annotated[Path, typer.Argument(help="YAML file; ready ones are in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For example filter.min_short_edge=448"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Take whole shards until there are N samples.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what was made with other settings.")
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="Make again what was made from inputs since changed.")
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Do failed rows again; the others stay.")
]
NoRay = Annotated[
    bool, typer.Option("--no-ray", help="One shard after the other, in this process.")
]


def run_job(pipeline: "Pipeline", options: "Options", console: "Console") -> "Runner":
    """Run to the end, or leave with the exit status of an interrupted or a stopped run."""
    from fusion_pipeline.engine.stop import StoppedError
    from fusion_pipeline.runner import Runner

    runner = Runner(pipeline, options, console)
    try:
        runner.run()
    except KeyboardInterrupt:
        console.print("Interrupted. Finished shards are kept; the same command resumes.")
        raise typer.Exit(130) from None
    except StoppedError as error:
        console.print(str(error))
        raise typer.Exit(128 + signal.SIGTERM) from None
    return runner
