"""k-means: same bytes every time, and the sample does not see the shards."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.select.kmeans import NoGpuError, assign, draw_sample, fit_centroids


def blobs(seed: int, n: int = 600, d: int = 16, centres: int = 5) -> np.ndarray:
    random = np.random.default_rng(seed)
    middle = random.normal(size=(centres, d))
    return (middle[np.arange(n) % centres] + 0.1 * random.normal(size=(n, d))).astype(np.float32)


def test_fit_converges_to_spherical_means() -> None:
    rows = blobs(1)
    centroids = fit_centroids(rows, k=8, iterations=50, seed=3)
    cluster, similarity = assign(rows, centroids)
    assert (centroids.dtype, cluster.dtype, similarity.dtype) == (np.float32, np.int32, np.float32)
    assert sorted(set(cluster.tolist())) == list(range(8))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for c in range(8):
        mean = unit[cluster == c].mean(axis=0)
        assert np.allclose(mean / np.linalg.norm(mean), centroids[c], atol=1e-4)


FIT = """
import hashlib, numpy as np
from fusion_pipeline.select.kmeans import assign, fit_centroids
rows = np.random.default_rng(5).normal(size=(3000, 32)).astype(np.float32)
c = fit_centroids(rows, 40, 15, seed=7)
print(hashlib.sha256(c.tobytes() + b"".join(a.tobytes() for a in assign(rows, c))).hexdigest())
"""


def test_bytes_do_not_depend_on_process_or_cores() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", FIT],
            env=os.environ | {"OMP_NUM_THREADS": cores, "OPENBLAS_NUM_THREADS": cores},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for cores in ("1", "4")
    }
    assert len(digests) == 1


def test_fewer_rows_than_k_makes_every_row_a_centroid() -> None:
    rows = np.eye(3, 8, dtype=np.float32) * 2
    centroids = fit_centroids(rows, k=10, iterations=5, seed=0)
    assert sorted(centroids.tolist()) == sorted(np.eye(3, 8).tolist())


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_row_without_direction_is_an_error(bad: float) -> None:
    rows = blobs(2)
    rows[17] = bad
    with pytest.raises(ValueError, match="row 17"):
        fit_centroids(rows, k=5, iterations=2, seed=0)


def test_gpus_that_faiss_cannot_use_are_told() -> None:
    with pytest.raises(NoGpuError, match=r"select\.gpus is 64, and .* sees \d+: .*faiss-gpu"):
        fit_centroids(blobs(2), k=2, iterations=2, seed=0, gpus=64)


def test_assignment_does_not_depend_on_the_rows_beside() -> None:
    rows = np.random.default_rng(4).normal(size=(257, 24)).astype(np.float16)
    # Two pairs of equal centroids: the lower index must win every time.
    centroids = np.random.default_rng(5).normal(size=(6, 24)).astype(np.float32)[[0, 1, 0, 2, 1, 3]]
    cluster, similarity = assign(rows, centroids)
    assert not set(cluster.tolist()) & {2, 4}
    one_by_one = [assign(rows[i : i + 1], centroids) for i in range(len(rows))]
    assert np.concatenate([c for c, _ in one_by_one]).tobytes() == cluster.tobytes()
    assert np.concatenate([s for _, s in one_by_one]).tobytes() == similarity.tobytes()
    truth = np.array(rows, np.float64) @ (
        centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    ).T.astype(np.float64)
    truth /= np.linalg.norm(np.array(rows, np.float64), axis=1, keepdims=True)
    assert np.allclose(truth.max(axis=1), similarity, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    keys=st.lists(st.text("0123456789abcdef", min_size=1, max_size=6), unique=True, max_size=40),
    size=st.integers(0, 50),
    seed=st.integers(0, 2**63),
    shards=st.integers(1, 5),
    random=st.randoms(use_true_random=False),
)
def test_draw_does_not_see_the_shards(keys, size, seed, shards, random) -> None:  # type: ignore[no-untyped-def]
    drawn = [keys[i] for i in draw_sample(keys, size, seed)]
    assert len(drawn) == min(size, len(keys))
    shuffled = random.sample(keys, len(keys))
    parts = [shuffled[s::shards] for s in range(shards)]
    merged = [part[i] for part in parts for i in draw_sample(part, size, seed)]
    assert [merged[i] for i in draw_sample(merged, size, seed)] == drawn


def test_other_seeds_draw_other_samples() -> None:
    keys = [f"{i:032x}" for i in range(200)]
    assert draw_sample(keys, 20, 1).tolist() != draw_sample(keys, 20, 2).tolist()
