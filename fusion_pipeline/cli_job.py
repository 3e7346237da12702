"""What the commands that run steps have in common."""

import signal
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:  # imported inside the commands: `fusion --help` is to answer at once
    from rich.console import Console

    from fusion_pipeline.pipeline import Pipeline
    from fusion_pipeline.runner import Options, Runner


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
