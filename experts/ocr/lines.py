"""What recognisers of text lines share."""

import unicodedata

import numpy as np
import numpy.typing as npt

Quad = npt.NDArray[np.float32]
"""float32 [4, 2]: corners in pixels, from the top left clockwise."""


def clean(text: str) -> str:
    """Without control, format, private and unassigned characters; single spaces."""
    visible = (c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(visible).split())
