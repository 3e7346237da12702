"""Spherical k-means over image embeddings, and the sample it is fitted on.

Configuration of SemDeDup's release, which DenseFusion-1M uses (section 2 of both): unit rows,
inner product, FAISS. The fit and the assignment give the same bytes for any number of cores and
for any split of the rows into shards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fusion_pipeline.errors import FusionError
from fusion_pipeline.select.neighbours import unit_rows

# FAISS's own default, as in SemDeDup's release: more points a centroid don't change the centroids.
POINTS_PER_CENTROID = 256
# Far above the rounding of a float32 inner product of unit rows (about 1e-6).
_TIE = 1e-5
_BLOCK_ROWS = 16_384


def draw_sample(keys: Sequence[str], size: int, seed: int) -> NDArray[np.int64]:
    """Draw `size` rows by a hash of their keys: int64[min(size, n)] row indices.

    The draw and its order depend on the set of keys and the seed alone, so the fit does not see
    how rows were sharded. It is mergeable: drawing from the union of the shards' draws gives the
    draw from all rows, so no worker needs all the keys.
    """
    if size < 0:
        raise ValueError(f"sample size must be at least 0, got {size}")
    # A keyed hash: other seeds draw other samples.
    secret = str(seed).encode()
    digests = [blake2b(key.encode(), digest_size=16, key=secret).digest() for key in keys]
    ranked = sorted(range(len(keys)), key=lambda row: (digests[row], keys[row], row))
    return np.asarray(ranked[:size], dtype=np.int64)


class NoGpuError(FusionError):
    """FAISS can't use the GPUs that the config gives it."""


def fit_centroids(
    sample: NDArray[np.floating],
    k: int,
    iterations: int,
    seed: int,
    threads: int = 1,
    gpus: int = 0,
) -> NDArray[np.float32]:
    """Fit spherical k-means: float[n, d] rows (any norm but 0) -> float32[k, d] unit centroids.

    With fewer rows than `k` every row is a centroid: k becomes n. Rows beyond
    `POINTS_PER_CENTROID` a centroid are left out by FAISS's seeded sub-sampling.
    `threads` is explicit because the number of threads may change the last bits.

    Raises ValueError for an empty sample, k < 1, and rows that are zero or not finite, NoGpuError
    where there are fewer GPUs than `gpus`, or none that this FAISS can use.
    """
    if k < 1 or iterations < 1:
        raise ValueError(f"k and iterations must be at least 1, got {k} and {iterations}")
    rows = unit_rows(sample)
    if len(rows) == 0:
        raise ValueError("k-means needs at least one row")
    import faiss  # an extra: only what clusters needs it

    if gpus > (seen := faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0):
        raise NoGpuError(
            f"select.gpus is {gpus}, and this FAISS sees {seen}: pip install "
            "'fusion-pipeline[faiss-gpu]' in place of faiss-cpu, on nodes with GPUs; or set it to 0"
        )
    kmeans = faiss.Kmeans(
        rows.shape[1],
        min(k, len(rows)),
        niter=iterations,
        nredo=1,
        verbose=False,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
        gpu=gpus,
    )
    with _faiss_threads(threads):
        kmeans.train(rows)
    return unit_rows(np.asarray(kmeans.centroids, dtype=np.float32))


def assign(
    embeddings: NDArray[np.floating], centroids: NDArray[np.float32], threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Nearest centroid of each row: cluster int32[n] and cosine similarity float32[n], -1..1.

    Exact: where the best two are closer than float32 rounding, the row is compared with all
    centroids in float64 and the lowest index wins a tie, so a row's cluster does not depend on
    the rows beside it.
    """
    import faiss  # an extra: only what clusters needs it

    centres = unit_rows(centroids)
    centres64 = centres.astype(np.float64)
    cluster = np.empty(len(embeddings), dtype=np.int32)
    similarity = np.empty(len(embeddings), dtype=np.float32)
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        rows = unit_rows(embeddings[start : start + _BLOCK_ROWS])
        with _faiss_threads(threads):
            best, index = faiss.knn(rows, centres, min(2, len(centres)), faiss.METRIC_INNER_PRODUCT)
        nearest = index[:, 0]
        if len(centres) > 1:
            for row in np.flatnonzero(best[:, 0] - best[:, 1] < _TIE):
                exact = np.einsum("d,kd->k", rows[row].astype(np.float64), centres64)
                nearest[row] = np.argmax(np.round(exact, 12))
        stop = start + len(rows)
        cluster[start:stop] = nearest
        # Not the BLAS value: its last bits depend on the row's place in the block.
        similarity[start:stop] = np.einsum(
            "nd,nd->n", rows.astype(np.float64), centres64[nearest]
        ).clip(-1.0, 1.0)
    return cluster, similarity


@contextmanager
def _faiss_threads(threads: int) -> Iterator[None]:
    import faiss

    # The setting is process-wide, so it goes back to what it was.
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
