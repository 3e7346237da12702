"""Perceptual fusion: web image-text pairs in, detailed captions that rest on evidence out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing the package stays cheap: `fusion --help` is to answer at once
    from pathlib import Path

    from fusion_pipeline.dataset.reading import Reader

__version__ = "0.1.0"
__all__ = ["__version__"]
"""Without `open`: a star import is not to hide Python's own."""


def open(path: "str | Path") -> "Reader":
    """A dataset for reading: a folder such as `runs/quickstart/selected`, local or `s3://...`.

    Raises FusionError with a message that says what to do when there is none.
    """
    from fusion_pipeline.dataset.reading import Reader

    return Reader.open(path)
