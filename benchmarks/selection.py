"""How well selection tells copies from other images, on demo data whose truth is known.

    python -m benchmarks.selection [--tune 1 2 3] [--report 29 30 31] [--work FOLDER]

Near-exact copies are judged on the report seeds, on which nothing was tuned. The semantic rule is
judged alone, on every sample: the tune seeds are there to choose its threshold, the report seeds to
say what that choice is worth. Two pictures go to docs/images. With `--work` the demo data and the
pools stay in a folder and are taken from there the next time.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table

from benchmarks.result import finish
from fusion_pipeline.config import SelectConfig, load_config
from fusion_pipeline.dataset.images import RGB, decode
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.demo.canvas import font
from fusion_pipeline.demo.evaluate import Row, Truth, score_copies, score_semantic
from fusion_pipeline.pipeline import build_pipeline
from fusion_pipeline.runner import Options, Runner
from fusion_pipeline.select.copies import is_near_exact
from fusion_pipeline.select.dedup import greedy
from fusion_pipeline.select.embed import read_embeddings
from fusion_pipeline.select.neighbours import exact_cosines, neighbour_pairs

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
THRESHOLDS = (0.85, 0.88, 0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
DECODE_EDGE = 600
"""Short edge of the decode that selection's own pixel check gets."""


@dataclass(frozen=True)
class Pool:
    """The pool of one seed, up to its `selection` table."""

    seed: int
    dataset: Dataset
    truth: Truth
    config: SelectConfig

    @cached_property
    def samples(self) -> dict[str, Row]:
        """Truth of each sample that has an embedding, by key."""
        truth = self.truth.by_sample(self.dataset)
        return {key: truth[key] for key in self._embedded[0]}

    @property
    def vectors(self) -> npt.NDArray[np.float16]:
        """[n, d] in the order of `samples`."""
        return self._embedded[1]

    @cached_property
    def pixels(self) -> dict[str, RGB]:
        images = {}
        for shard in self.dataset.shards():
            for key, data in self.dataset.read_images(shard).items():
                if key in self.samples and key not in images:
                    images[key] = decode(data, min_short_edge=DECODE_EDGE)
        return images

    @cached_property
    def _embedded(self) -> tuple[list[str], npt.NDArray[np.float16]]:
        rows: dict[str, npt.NDArray[np.float16]] = {}
        for _, table in self.dataset.iterate("embeddings"):
            vectors = read_embeddings(table)
            for i, row in enumerate(table.select(["key", "status"]).to_pylist()):
                if row["status"] == "ok":
                    rows.setdefault(row["key"], vectors[i])
        return list(rows), np.stack(list(rows.values()))

    def left_by_copies(self) -> set[str]:
        """Samples that neither equal bytes nor the near-exact rule dropped."""
        rows = [row for _, t in self.dataset.iterate("selection") for row in t.to_pylist()]
        gone = {row["key"] for row in rows if row["reason"] == "near_exact_copy"}
        return self.samples.keys() - gone

    def planted(self) -> Iterator[tuple[str, str, float]]:
        """(copy, source, cosine) of every planted copy; a twin of equal bytes is one sample."""
        keys = list(self.samples)
        place = {row["name"]: i for i, row in enumerate(self.samples.values())}
        pairs = [(i, place[r["copy_of"]]) for i, r in enumerate(self.samples.values())
                 if r["copy_of"] in place]  # fmt: skip
        cosines = exact_cosines(self.vectors, np.array(pairs))
        for (i, j), cosine in zip(pairs, cosines, strict=True):
            yield keys[i], keys[j], float(cosine)

    def distinct(self, above: float) -> Iterator[tuple[str, str, float]]:
        """(sample, sample, cosine) of every pair of other content with a cosine above."""
        keys = list(self.samples)
        one = np.zeros(len(keys), np.int32)
        pairs, cosines = neighbour_pairs(
            self.vectors, one, self.vectors[:1].astype(np.float32), above
        )
        for (i, j), cosine in zip(pairs.tolist(), cosines, strict=True):
            if self.samples[keys[i]]["content"] != self.samples[keys[j]]["content"]:
                yield keys[i], keys[j], float(cosine)


def make_pool(folder: Path, seed: int) -> Pool:
    """Demo data of a seed and its pool part; what is in the folder already is not made again."""
    demo = folder / f"demo-{seed}"
    if not (demo / "truth.json").exists():  # written last
        make_demo_data(demo, seed)
    overrides = [f"run={folder}/run-{seed}", f"source.webdataset={demo}/shards"]
    pipeline = build_pipeline(load_config(CONFIG, overrides))
    Runner(pipeline, Options(until="selection", in_process=True), Console(quiet=True)).run()
    truth = Truth.read(demo / "truth.json")
    return Pool(seed, pipeline.pool, truth, pipeline.config.select)


def near_exact(pools: Sequence[Pool]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each kind of near-exact copy, and what else there is to say of the rule."""
    scores = [score_copies(pool.dataset, pool.truth) for pool in pools]
    found: Counter[str] = Counter()
    for score in scores:
        found.update(score.found)
    missed = [f"seed {p.seed}: {m}" for p, s in zip(pools, scores, strict=True) for m in s.missed]
    merged = [f"seed {p.seed}: {m}" for p, s in zip(pools, scores, strict=True) for m in s.merged]
    residuals, lowest = _residuals(pools)
    rows: list[dict[str, Any]] = []
    for kind in sorted(k for k in residuals if not k.startswith(("semantic", "exact"))):
        lost = sum(f"({kind}, " in text for text in missed)
        rows.append(
            {
                "kind": kind,
                "planted": found[kind] + lost,
                "found": found[kind],
                "missed": lost,
                "usual score": float(np.median(residuals[kind])),
                "worst score": max(residuals[kind]),
                "lowest cosine": lowest[kind],
            }
        )
    other_edits = {
        kind: {"planted": len(values), "confirmed": sum(value <= 1 for value in values)}
        for kind, values in sorted(residuals.items())
        if kind.startswith("semantic")
    }
    details = {
        "missed": missed,
        "merged": merged,
        "other_edits": other_edits,
        "distinct": _distinct_residuals(pools),
    }
    return rows, details


def _residuals(pools: Sequence[Pool]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Of planted copies by kind: the pixel check's scores (at most 1: confirmed) against their
    sources, and the lowest cosine (over `propose`: looked at)."""
    scores: dict[str, list[float]] = {}
    lowest: dict[str, float] = {}
    for pool in pools:
        for copy, source, cosine in pool.planted():
            kind = pool.samples[copy]["copy_kind"]
            verdict = is_near_exact(pool.pixels[copy], pool.pixels[source], pool.config.copies.rule)
            scores.setdefault(kind, []).append(verdict.score)
            lowest[kind] = min(cosine, lowest.get(kind, 1.0))
    return scores, lowest


def _distinct_residuals(pools: Sequence[Pool]) -> dict[str, Any]:
    """Pairs of other content that the embedding proposes, and which of them came closest."""
    pairs = 0
    closest: list[tuple[float, str]] = []
    for pool in pools:
        for a, b, cosine in pool.distinct(pool.config.copies.propose):
            verdict = is_near_exact(pool.pixels[a], pool.pixels[b], pool.config.copies.rule)
            names = " and ".join(sorted(pool.samples[key]["content"] for key in (a, b)))
            closest.append((verdict.score, f"seed {pool.seed}: {names}, cosine {cosine:.3f}"))
            pairs += 1
    nearest = [{"score": score, "pair": pair} for score, pair in sorted(closest)[:5]]
    return {"pairs": pairs, "closest": nearest}


def semantic(pools: Sequence[Pool], seeds: str) -> list[dict[str, Any]]:
    """The semantic rule alone over every sample, all seeds together, by threshold."""
    by_pool = [score_semantic(p.dataset, p.truth, _thresholds(pools)) for p in pools]
    redundant = sum(scores[0].redundant for scores in by_pool)
    counts = [
        (sum(s.dropped for s in scores), sum(s.right for s in scores))
        for scores in zip(*by_pool, strict=True)
    ]
    return _curve(seeds, pools, counts, redundant)


def semantic_after(pools: Sequence[Pool], seeds: str) -> list[dict[str, Any]]:
    """The same over what the near-exact rule has left: what the semantic rule adds to it."""
    counts = [(0, 0) for _ in _thresholds(pools)]
    redundant = 0
    for pool in pools:
        left = sorted(pool.left_by_copies())
        content = [pool.samples[key]["content"] for key in left]
        redundant += len(content) - len(set(content))
        place = {key: i for i, key in enumerate(pool.samples)}
        vectors = pool.vectors[[place[key] for key in left]]
        one, centroid = np.zeros(len(left), np.int32), vectors[:1].astype(np.float32)
        for t, threshold in enumerate(_thresholds(pools)):
            pairs, _ = neighbour_pairs(vectors, one, centroid, threshold)
            by = greedy(len(left), pairs, np.arange(len(left))).tolist()
            right = [content[i] == content[j] for i, j in enumerate(by) if j >= 0]
            counts[t] = counts[t][0] + len(right), counts[t][1] + sum(right)
    return _curve(seeds, pools, counts, redundant)


def _thresholds(pools: Sequence[Pool]) -> list[float]:
    return sorted({*THRESHOLDS, pools[0].config.duplicates.threshold})


def _curve(
    seeds: str, pools: Sequence[Pool], counts: Sequence[tuple[int, int]], redundant: int
) -> list[dict[str, Any]]:
    return [
        {
            "seeds": seeds,
            "threshold": threshold,
            "default": "<-" if threshold == pools[0].config.duplicates.threshold else "",
            "dropped": dropped,
            "right": right,
            "wrong": dropped - right,
            "redundant": redundant,
            "precision": right / dropped if dropped else 1.0,
            "recall": right / redundant,
        }
        for threshold, (dropped, right) in zip(_thresholds(pools), counts, strict=True)
    ]


# Pictures

_CELL = (250, 176)
_INK, _PAPER, _RED, _GREEN = (24, 28, 36), (255, 255, 255), (178, 34, 34), (20, 110, 60)


def failures(pool: Pool, path: Path) -> None:
    """Contact sheet: what the semantic rule alone, at its default, drops wrongly and misses."""
    threshold = pool.config.duplicates.threshold
    (score,) = score_semantic(pool.dataset, pool.truth, [threshold])
    wrong = _varied(pool, sorted(score.wrong, key=lambda pair: -pair[2]))[:6]
    missed = _varied(pool, [pair for pair in pool.planted() if pair[2] <= threshold])[:6]
    blocks = (
        (f"Wrongly dropped at {threshold} (left), for the kept image on the right", _RED, wrong),
        (f"Missed at {threshold}: a copy (left) of the image on the right", _GREEN, missed),
    )
    width, height = 2 * _CELL[0] + 36, _CELL[1] + 34
    rows = sum(-(-len(pairs) // 2) for _, _, pairs in blocks)
    sheet = Image.new("RGB", (2 * width + 12, rows * height + 44 * len(blocks)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = 0
    for title, color, pairs in blocks:
        draw.text((16, y + 12), title, color, font("sans-bold", 18))
        y += 44
        for i, (a, b, cosine) in enumerate(pairs):
            left, top = 16 + i % 2 * width, y + i // 2 * height
            for x, key in ((left, a), (left + _CELL[0] + 8, b)):
                view = ImageOps.contain(Image.fromarray(pool.pixels[key]), _CELL)
                sheet.paste(view, (x, top))
                draw.rectangle((x, top, x + view.width, top + view.height), None, color)
            text = f"cosine {cosine:.3f}   {_caption(pool, a, b)}"
            draw.text((left, top + _CELL[1] + 6), text, _INK, font("sans", 14))
        y += -(-len(pairs) // 2) * height
    sheet.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


def _caption(pool: Pool, a: str, b: str) -> str:
    row, other = pool.samples[a], pool.samples[b]
    if row["content"] != other["content"]:
        return f"{row['content']} | {other['content']}"
    found = is_near_exact(pool.pixels[a], pool.pixels[b], pool.config.copies.rule).confirmed
    by_pixels = "found" if found else "not found"
    return f"{row['copy_kind'].removeprefix('semantic:')}; {by_pixels} by the pixel check"


def _varied(pool: Pool, pairs: list[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
    """Each kind of picture and copy once, then twice, ...; inside a kind the given order."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for pair in pairs:
        row, other = pool.samples[pair[0]], pool.samples[pair[1]]
        kind = (row["kind"], other["kind"])
        if row["content"] == other["content"]:
            kind = (row["copy_kind"], "")
        turns.append(seen[kind])
        seen[kind] += 1
    return [pairs[i] for i in np.argsort(turns, kind="stable")]


def cosine_chart(pools: Sequence[Pool], path: Path) -> None:
    """Cosines of copies to their source, and of images to the nearest one of other content."""
    from matplotlib.figure import Figure

    groups: dict[str, list[float]] = {}
    nearest: dict[tuple[int, str], float] = {}
    for pool in pools:
        for copy, _, cosine in pool.planted():
            kind = pool.samples[copy]["copy_kind"].removeprefix("semantic:")
            groups.setdefault(f"copy: {kind}", []).append(cosine)
        for a, b, cosine in pool.distinct(0.0):
            for key in (a, b):
                at = (pool.seed, key)
                nearest[at] = max(cosine, nearest.get(at, 0.0))
    groups = dict(sorted(groups.items(), key=lambda item: np.median(item[1])))
    samples = {pool.seed: pool.samples for pool in pools}
    for (seed, key), cosine in nearest.items():
        kind = samples[seed][key]["kind"]
        kind = kind if kind in ("slide", "photo") else "other pictures"
        groups.setdefault(f"nearest other image: {kind}", []).append(cosine)
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for y, (name, values) in enumerate(groups.items()):
        color = "tab:green" if name.startswith("copy") else "tab:red"
        axes.scatter(values, y + rng.uniform(-0.25, 0.25, len(values)), 9, color, alpha=0.55)
    default = pools[0].config.duplicates.threshold
    axes.axvline(default, color="black", linewidth=1)
    axes.set_title(f"line: default threshold {default}", fontsize=9)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_xlabel("cosine similarity of the embeddings")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", type=int, nargs="+", default=[29, 30, 31])
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        tune = [make_pool(folder, seed) for seed in options.tune]
        report = [make_pool(folder, seed) for seed in options.report]
        IMAGES.mkdir(parents=True, exist_ok=True)
        failures(report[0], IMAGES / "selection-failures.png")
        cosine_chart(report, IMAGES / "selection-cosines.png")
        curve = [*semantic(tune, "tune"), *semantic(report, "report")]
        show("semantic rule alone", curve)
        after = [*semantic_after(tune, "tune"), *semantic_after(report, "report")]
        show("semantic rule on what the near-exact rule left", after)
        rows, details = near_exact(report)
    show("pairs of other content that came closest", details["distinct"]["closest"])
    planted, found = sum(row["planted"] for row in rows), sum(row["found"] for row in rows)
    details |= {
        "seeds": {"tune": options.tune, "report": options.report},
        "semantic": curve,
        "semantic_after_near_exact": after,
    }
    ok = found == planted and not details["merged"]
    finish("near-exact-copies", found / planted, "found / planted", 1.0, ok, rows, details)


if __name__ == "__main__":
    main()
