"""Semantic de-duplication: which row is dropped, and in favour of which other row.

`greedy` is the default, `semdedup` the rule of SemDeDup's release (Abbas et al., 2303.09540;
facebookresearch/SemDeDup, semdedup.py). They differ in one point: there, a row that was itself
dropped still drops others, so that some dropped rows have no surviving neighbour.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusion_pipeline.select.neighbours import EXACT_MARGIN, exact_cosines, unit_rows

KEPT = -1


def greedy(n: int, pairs: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Greedy de-duplication by one total order: dropped_by int64[n], -1 for a kept row.

    pairs: int64[m, 2] of neighbours, in any order and orientation, repeats allowed.
    order: a permutation of 0..n-1, most wanted row first (priority, then key).

    A row is dropped exactly when a *kept* row before it in `order` is its neighbour; `dropped_by`
    names the first such row. So no two kept rows are neighbours, and every dropped row has a kept
    neighbour. Rows that no chain of pairs connects don't influence each other: connected groups
    may be decided apart.
    """
    rank = ranks(order, n)
    dropped_by = np.full(n, KEPT, dtype=np.int64)
    if len(pairs) == 0:
        return dropped_by
    if pairs.min() < 0 or pairs.max() >= n or (pairs[:, 0] == pairs[:, 1]).any():
        raise ValueError(f"pairs must join two different rows of 0..{n - 1}")
    forward = rank[pairs[:, 0]] < rank[pairs[:, 1]]
    better = np.where(forward, pairs[:, 0], pairs[:, 1])
    worse = np.where(forward, pairs[:, 1], pairs[:, 0])
    by_rank = np.argsort(rank[better], kind="stable")
    better, worse = better[by_rank], worse[by_rank]
    starts = np.flatnonzero(np.r_[True, better[1:] != better[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(better)], strict=True):
        row = better[start]
        # Every better neighbour of `row` has had its turn, so its fate is final here.
        if dropped_by[row] == KEPT:
            others = worse[start:stop]
            dropped_by[others[dropped_by[others] == KEPT]] = row
    return dropped_by


def semdedup(
    embeddings: NDArray[np.floating],
    centroid: NDArray[np.float32],
    eps: float,
    keep: Literal["hard", "easy"] = "hard",
    block: int = 2_048,
) -> NDArray[np.int64]:
    """SemDeDup's released rule on one cluster: dropped_by int64[n], -1 for a kept row.

    embeddings: [n, d], the rows of one cluster; centroid: [d]; eps: 0..1.
    Rows are sorted by distance to the centroid, farthest first ("hard", the release's default)
    or nearest first ("easy"); the sort is stable, so rows that come in key order give one result.
    A row is dropped when its largest cosine to an *earlier* row is > 1 - eps, even when that
    row was itself dropped; `dropped_by` names the first earlier row above the threshold.

    Cosines within 1e-4 of the threshold are decided in float64. Memory O(block * (d + block)).
    """
    if not 0.0 <= eps <= 1.0:
        raise ValueError(f"eps must lie in 0..1, got {eps}")
    dropped_by = np.full(len(embeddings), KEPT, dtype=np.int64)
    order = semdedup_order(embeddings, centroid, keep)
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        for other in range(0, start + 1, block):
            earlier = order[other : other + block]
            above = _above(embeddings, rows, earlier, 1.0 - eps)
            if other == start:
                above = np.tril(above, -1)
            hit = above.any(axis=1) & (dropped_by[rows] == KEPT)
            dropped_by[rows[hit]] = earlier[above[hit].argmax(axis=1)]
    return dropped_by


def semdedup_order(
    embeddings: NDArray[np.floating],
    centroid: NDArray[np.float32],
    keep: Literal["hard", "easy"] = "hard",
) -> NDArray[np.int64]:
    """The order in which the release visits a cluster's rows: int64[n], first visited first."""
    centre = unit_rows(centroid[None, :])[0].astype(np.float64)
    distance = 1.0 - np.einsum("nd,d->n", unit_rows(embeddings).astype(np.float64), centre)
    return np.argsort(-distance if keep == "hard" else distance, kind="stable")


def ranks(order: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Place of each row in `order`: int64[n]. Raises ValueError unless it permutes 0..n-1."""
    rank = np.full(n, -1, dtype=np.int64)
    if len(order) == n and (n == 0 or (order.min() >= 0 and order.max() < n)):
        rank[order] = np.arange(n)
    if len(order) != n or (rank < 0).any():
        raise ValueError(f"order must be a permutation of 0..{n - 1}")
    return rank


def _above(
    embeddings: NDArray[np.floating],
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    threshold: float,
) -> NDArray[np.bool_]:
    """Is the cosine of (row, other) above the threshold: bool[rows, others]."""
    rough = unit_rows(embeddings[rows]) @ unit_rows(embeddings[others]).T
    above = rough > threshold
    i, j = np.nonzero(np.abs(rough - threshold) < EXACT_MARGIN)
    exact = exact_cosines(embeddings, np.stack([rows[i], others[j]], axis=1))
    above[i, j] = exact > threshold
    return np.asarray(above)
