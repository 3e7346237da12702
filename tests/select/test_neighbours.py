"""Neighbour pairs equal an all-pairs reference, whatever the blocks and the order of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.select.neighbours import neighbour_pairs


def rows_and_clusters(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(n, 6)).astype(np.float16)
    rows[n // 2 :] = rows[: n - n // 2] * np.float16(0.5)  # exact duplicates in direction
    return rows, random.integers(0, k, n).astype(np.int32), random.normal(size=(k, 6)).astype("f4")


def reference(
    rows: np.ndarray, cluster: np.ndarray, centroids: np.ndarray, threshold: float, probes: int
) -> dict[tuple[int, int], float]:
    x = rows.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    c = centroids.astype(np.float64)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    closeness = c @ c.T
    np.fill_diagonal(closeness, 9)
    nearest = [set(np.argsort(-row)[:probes]) for row in closeness]
    return {
        (i, j): float(x[i] @ x[j])
        for i in range(len(x))
        for j in range(i + 1, len(x))
        if x[i] @ x[j] > threshold
        and cluster[i] in nearest[cluster[j]]
        and cluster[j] in nearest[cluster[i]]
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    k=st.integers(1, 6),
    probes=st.integers(1, 7),
    threshold=st.floats(-0.5, 0.999),
    block=st.integers(1, 70),
)
def test_equals_all_pairs_reference(seed, n, k, probes, threshold, block) -> None:  # type: ignore[no-untyped-def]
    rows, cluster, centroids = rows_and_clusters(seed, n, k)
    pairs, cosine = neighbour_pairs(rows, cluster, centroids, threshold, probes, block)
    expected = reference(rows, cluster, centroids, threshold, probes)
    assert [tuple(p) for p in pairs.tolist()] == sorted(expected)
    assert np.allclose(cosine, [expected[tuple(p)] for p in pairs.tolist()], atol=1e-12)
    other = neighbour_pairs(rows, cluster, centroids, threshold, probes, block + 13)
    assert (pairs.tobytes(), cosine.tobytes()) == (other[0].tobytes(), other[1].tobytes())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), probes=st.integers(1, 4))
def test_order_of_rows_does_not_matter(seed, probes) -> None:  # type: ignore[no-untyped-def]
    rows, cluster, centroids = rows_and_clusters(seed, 40, 4)
    moved = np.random.default_rng(seed).permutation(40)
    pairs, _ = neighbour_pairs(rows, cluster, centroids, 0.5, probes)
    again, _ = neighbour_pairs(rows[moved], cluster[moved], centroids, 0.5, probes)
    assert {tuple(sorted(p)) for p in moved[again].tolist()} == {tuple(p) for p in pairs.tolist()}


def test_decision_at_the_threshold_is_exact() -> None:
    # cos = 0.8 + 2e-8, above the threshold by less than half a float32 step there.
    angle = np.arccos(0.8 + 2e-8)
    rows = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    cluster, centroids = np.zeros(2, np.int32), np.ones((1, 2), np.float32)
    assert len(neighbour_pairs(rows, cluster, centroids, 0.8)[0]) == 1
    assert len(neighbour_pairs(rows, cluster, centroids, 0.8 + 3e-8)[0]) == 0


def test_failed_rows_must_be_left_out_by_the_caller() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 0.0]], np.float16)
    with pytest.raises(ValueError, match="zero or not finite"):
        neighbour_pairs(rows, np.zeros(2, np.int32), np.ones((1, 2), np.float32), 0.5)
