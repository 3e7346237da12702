"""The images that stand for a cluster (DenseFusion-1M, section 3.1: the top 20 of each)."""

import numpy as np
from numpy.typing import NDArray

from fusion_pipeline.select.dedup import ranks


def choose(
    cluster: NDArray[np.int32],
    order: NDArray[np.int64],
    kept: NDArray[np.bool_],
    per_cluster: int,
) -> NDArray[np.bool_]:
    """The first `per_cluster` kept rows of each cluster in the total order: bool[n].

    cluster: int32[n]; order: a permutation of 0..n-1, most wanted row first; kept: bool[n], the
    rows that de-duplication left. A cluster with fewer kept rows gives all of them. The paper
    does not say by what its "top" is ranked; the caller's order does (for instance: larger
    image, then nearer to the centroid, then key).
    """
    if per_cluster < 0:
        raise ValueError(f"per_cluster must be at least 0, got {per_cluster}")
    rows = np.flatnonzero(kept)
    sorted_rows = rows[np.lexsort((ranks(order, len(cluster))[rows], cluster[rows]))]
    _, first, sizes = np.unique(cluster[sorted_rows], return_index=True, return_counts=True)
    place = np.arange(len(sorted_rows)) - np.repeat(first, sizes)
    chosen = np.zeros(len(cluster), dtype=np.bool_)
    chosen[sorted_rows[place < per_cluster]] = True
    return chosen
