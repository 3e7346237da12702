"""Clustering: centroids fitted on a seeded sample (an artifact), rows assigned shard by shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_pipeline.dataset.artifacts import Artifact, read_artifact, write_artifact
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.rows import Ok, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker
from fusion_pipeline.errors import FusionError
from fusion_pipeline.select.embed import read_embeddings
from fusion_pipeline.select.kmeans import POINTS_PER_CENTROID, assign, draw_sample, fit_centroids

CENTROIDS = "centroids"


class NoImagesError(FusionError):
    """Every sample failed or was filtered before it could be clustered."""


@dataclass(frozen=True)
class Centroids:
    """Global step: spherical k-means over at most 256 points a centroid, drawn by key hash."""

    clusters: int
    iterations: int
    seed: int
    threads: int = 1
    gpus: int = 0

    name = CENTROIDS
    version = 1
    reads: tuple[str, ...] = ("embeddings",)

    def settings(self) -> Mapping[str, Any]:
        # Threads and GPUs may change a result's last bits; of one thread there is nothing to tell.
        threads = {"threads": self.threads} if self.threads > 1 else {}
        gpus = {"gpus": self.gpus} if self.gpus else {}
        settings = {"clusters": self.clusters, "iterations": self.iterations, "seed": self.seed}
        return {**settings, **threads, **gpus}

    @property
    def resources(self) -> Resources:
        return Resources(cpus=self.threads, gpus=self.gpus, threads=self.threads)

    def run(
        self, dataset: Dataset, artifact: Artifact, inputs: Mapping[str, str], token: str
    ) -> None:
        """Fit and commit. Memory: 10 bytes x dimensions x rows of the sample, which are 256 a
        cluster, or all where there are fewer."""
        size = self.clusters * POINTS_PER_CENTROID
        keys: list[str] = []
        parts: list[npt.NDArray[np.float16]] = []
        for _, table in dataset.iterate("embeddings"):
            live = table.filter(pa.compute.equal(table["status"], "ok"))
            if not live.num_rows:
                continue
            parts.append(read_embeddings(live))
            keys += live["key"].to_pylist()
            if len(keys) > 2 * size:  # drawing is mergeable: keep no more than the final draw needs
                keep = draw_sample(keys, size, self.seed)
                keys, parts = [keys[i] for i in keep], [np.concatenate(parts)[keep]]
        if not keys:
            raise NoImagesError("no image is left to cluster: `fusion status` says why")
        sample = np.concatenate(parts)[draw_sample(keys, size, self.seed)]
        parts.clear()
        fitted = fit_centroids(
            sample, self.clusters, self.iterations, self.seed, self.threads, self.gpus
        )
        packed = pa.array([row.tobytes() for row in fitted], pa.binary(4 * fitted.shape[1]))
        write_artifact(dataset, artifact, inputs, pa.table({"centroid": packed}), token)


def read_centroids(dataset: Dataset) -> npt.NDArray[np.float32]:
    """float32 [k, d], unit rows."""
    column = read_artifact(dataset, CENTROIDS)["centroid"].to_pylist()
    return np.stack([np.frombuffer(row, np.float32) for row in column])


@dataclass(frozen=True)
class Clusters:
    """Nearest centroid of each row."""

    dataset: Dataset
    resources: Resources = CPU_WORKER

    name = "clusters"
    version = 1
    reads: tuple[str, ...] = ("embeddings",)
    columns: Sequence[pa.Field] = (
        pa.field("cluster", pa.int32()),
        pa.field("similarity", pa.float32()),
    )

    def settings(self) -> Mapping[str, Any]:
        return {}

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        centroids = read_centroids(self.dataset)

        def work(block: ShardBlock) -> pa.Table:
            cluster, similarity = assign(read_embeddings(block.table("embeddings")), centroids)
            outcomes = [
                Ok({"cluster": int(c), "similarity": float(s)})
                for c, s in zip(cluster, similarity, strict=True)
            ]
            return build_table(block.keys, outcomes, self.columns)

        return work
