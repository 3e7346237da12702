"""The `fusion meta` commands: the captions that a strong model writes for a part of the images."""

import typer

meta = typer.Typer(
    help="The meta set: captions of a part of the images by a strong model.", no_args_is_help=True
)
