"""From a model's numbers to labels with scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_pipeline.dataset.evidence import Tag

Floats = npt.NDArray[np.floating[Any]]


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the last axis, in float32."""
    exp: npt.NDArray[np.float32] = np.exp(logits - logits.max(axis=-1, keepdims=True))
    exp /= exp.sum(axis=-1, keepdims=True)
    return exp


def ranked(
    labels: Sequence[str], scores: Floats, most: int, floors: float | Floats = 0.0
) -> list[Tag]:
    """Up to `most` labels whose scores [labels] reach their floors, best first.

    Raises ValueError for scores that are no numbers: half precision overflows in some models.
    """
    if not np.isfinite(scores).all():
        raise ValueError("not_finite: the model's answer holds values that are no numbers")
    best = np.argsort(-scores, kind="stable")
    told = best[(scores >= floors)[best]][:most]
    return [Tag(labels[i], float(scores[i])) for i in told]
