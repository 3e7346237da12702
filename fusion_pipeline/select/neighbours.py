"""Pairs of rows whose embeddings are closer than a threshold, exact and blockwise.

numpy blocks rather than FAISS's IVF range search: that one probes the centroids nearest to the
*query row*, so i may find j where j does not find i; the rule here is symmetric.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Cosines this close to the threshold are decided in float64: the float32 product of a block
# differs in its last bits with the block's shape (about 1e-6, a hundred times less than this).
EXACT_MARGIN = 1e-4
_EXACT_PAIRS = 8_192
_BLOCK_ROWS = 65_536


def unit_rows(embeddings: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to unit length: float16/32/64[n, d] -> float32[n, d], C-contiguous.

    Rows that were stored as float16 have lost their unit norm (by up to 5e-4), so every reader
    normalises again. Raises ValueError for a row that is zero or not finite: it has no direction.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [n, d], got shape {embeddings.shape}")
    units = np.empty(embeddings.shape, np.float32)
    norms = np.empty(len(embeddings))
    for start in range(0, len(units), _BLOCK_ROWS):  # float64 of all would be four times float16
        part = slice(start, start + _BLOCK_ROWS)
        rows = np.asarray(embeddings[part], np.float64)
        norms[part] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        with np.errstate(divide="ignore", invalid="ignore"):  # told below
            units[part] = rows / norms[part, None]
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(f"embedding of row {bad[0]} is zero or not finite ({len(bad)} such rows)")
    return units


def neighbour_pairs(
    embeddings: NDArray[np.floating],
    cluster: NDArray[np.int32],
    centroids: NDArray[np.float32],
    threshold: float,
    probes: int = 1,
    block: int = 2_048,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All pairs with cosine > threshold among rows of the same or of neighbouring clusters.

    embeddings: [n, d] of any float type; cluster: int32[n]; centroids: [k, d]; probes >= 1.
    Two clusters are neighbours when each is among the other's `probes` nearest centroids, itself
    counted first: probes=1 compares inside clusters only, probes >= k compares all rows.

    Returns pairs int64[m, 2] with i < j, sorted, and their cosines float64[m]. The result does
    not depend on `block`; memory beyond the input is O(block * (d + block) + m).
    """
    if probes < 1 or block < 1:
        raise ValueError(f"probes and block must be at least 1, got {probes} and {block}")
    if len(cluster) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings but {len(cluster)} cluster numbers")
    members = _members(cluster, len(centroids))
    found: list[NDArray[np.int64]] = []
    cosines: list[NDArray[np.float64]] = []
    for left, right in _cluster_pairs(members, centroids, probes, block):
        for rows, others in _blocks(members[left], members[right], block):
            pairs, cosine = _compare(embeddings, rows, others, threshold)
            found.append(pairs)
            cosines.append(cosine)
    if not found:
        return np.empty((0, 2), np.int64), np.empty(0, np.float64)
    pairs, cosine = np.concatenate(found), np.concatenate(cosines)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], cosine[order]


def exact_cosines(
    embeddings: NDArray[np.floating], pairs: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cosines float64[m] of row pairs int64[m, 2], accumulated in float64."""
    cosine = np.empty(len(pairs), dtype=np.float64)
    for start in range(0, len(pairs), _EXACT_PAIRS):
        part = pairs[start : start + _EXACT_PAIRS]
        a = np.asarray(embeddings[part[:, 0]], dtype=np.float64)
        b = np.asarray(embeddings[part[:, 1]], dtype=np.float64)
        squares = np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b)
        cosine[start : start + len(part)] = np.einsum("nd,nd->n", a, b) / np.sqrt(squares)
    return cosine


def _members(cluster: NDArray[np.int32], k: int) -> list[NDArray[np.int64]]:
    if len(cluster) and not (cluster.min() >= 0 and cluster.max() < k):
        raise ValueError(f"cluster numbers must lie in 0..{k - 1}")
    by_cluster = np.argsort(cluster, kind="stable")
    return np.split(by_cluster, np.cumsum(np.bincount(cluster, minlength=k))[:-1])


def _cluster_pairs(
    members: list[NDArray[np.int64]], centroids: NDArray[np.float32], probes: int, block: int
) -> Iterator[tuple[int, int]]:
    k = len(centroids)
    used = [c for c in range(k) if len(members[c])]
    if probes == 1:
        yield from ((c, c) for c in used)
        return
    if probes >= k:
        yield from ((a, b) for a in used for b in used if a <= b)
        return
    nearest = [set(row) for row in _nearest_centroids(centroids, probes, block)]
    for a in used:
        both_ways = (b for b in sorted(nearest[a]) if a <= b and a in nearest[b])
        yield from ((a, b) for b in both_ways if len(members[b]))


def _nearest_centroids(centroids: NDArray[np.float32], probes: int, block: int) -> list[list[int]]:
    """For each centroid itself and its probes - 1 nearest others; ties go to the lower index."""
    unit = unit_rows(centroids)
    nearest: list[list[int]] = []
    for start in range(0, len(unit), block):
        # Rounded, so that the last bits of the product can't decide between equal centroids.
        cosine = np.round(unit[start : start + block] @ unit.T, 5)
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = np.inf
        nearest += np.argsort(-cosine, axis=1, kind="stable")[:, :probes].tolist()
    return nearest


def _blocks(
    left: NDArray[np.int64], right: NDArray[np.int64], block: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for i in range(0, len(left), block):
        # Inside one cluster the lower triangle of blocks repeats the upper one.
        for j in range(i if left is right else 0, len(right), block):
            yield left[i : i + block], right[j : j + block]


def _compare(
    embeddings: NDArray[np.floating],
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    threshold: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rough = unit_rows(embeddings[rows]) @ unit_rows(embeddings[others]).T
    near = rough > threshold - EXACT_MARGIN
    if rows[0] == others[0]:
        near = np.triu(near, 1)
    i, j = np.nonzero(near)
    pairs = np.sort(np.stack([rows[i], others[j]], axis=1), axis=1)
    # All that pass, not only those near the threshold, so that the cosines too are reproducible.
    cosine = exact_cosines(embeddings, pairs)
    keep = cosine > threshold
    return pairs[keep], cosine[keep]
