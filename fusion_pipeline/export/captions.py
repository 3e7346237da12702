"""Captioned samples in the formats that trainers read (LLaVA JSON, DenseFusion JSONL).

export/llava.json          a list of {id, image, conversations}
export/densefusion.jsonl   image_id, image_path, caption, url; ours adds hints and provenance
export/images/<shard>/     upright JPEG or PNG; paths in both files are relative to export/
export/manifest.json       what it was made from
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fusion_pipeline.dataset.artifacts import inputs_of
from fusion_pipeline.dataset.evidence import Box
from fusion_pipeline.dataset.filters import Predicate, tables_of
from fusion_pipeline.dataset.fingerprints import short_hash
from fusion_pipeline.dataset.images import ImageInfo, decode, encode, to_loadable
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.reading import Reader, Selection
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError
from fusion_pipeline.export.blur import Blur, blur

VERSION = 1
LLAVA, DENSEFUSION, MANIFEST = "llava.json", "densefusion.jsonl", "manifest.json"
IMAGES = "images"
INSTRUCTION = "Describe this image in detail."
"""The human turn; LLaVA's plain stages drop it."""


class ExportError(FusionError):
    """What is there can't be exported as it should be."""


class Exported(NamedTuple):
    samples: int
    withheld: int
    """Captioned samples that are left out: whether there is something to blur is not known."""
    blurred: int
    """Samples in whose images something is blurred."""
    unwanted: int
    """Captioned samples that are left out by `where`."""


@dataclass(frozen=True)
class Export:
    selected: Dataset
    captions: str
    """Table of captions, for example `captions/composer`."""
    prompts: str
    out: Storage
    blur: Blur | None = None
    where: tuple[Predicate, ...] = ()
    """Filters that all hold for what is exported."""

    @property
    def rules_by(self) -> set[str]:
        """Tables by which pictures are blurred and samples are left out."""
        tables = self.blur.tables if self.blur else ()
        return {*tables, *(tables_of(self.where) if self.where else ())}

    def inputs(self) -> dict[str, Any]:
        tables = ("samples", "hints", self.prompts, self.captions)
        made_of = {"version": VERSION, **inputs_of(self.selected, tables)}
        if self.blur is not None:
            rule = {"labels": list(self.blur.labels), "score": self.blur.score}
            made_of["blur"] = {**rule, **inputs_of(self.selected, self.blur.tables)}
        if self.where:
            filters = [list(one) for one in self.where]
            made_of["where"] = [filters, inputs_of(self.selected, tables_of(self.where))]
        return made_of

    def is_current(self) -> bool:
        return self.manifest().get("inputs") == self.inputs()

    def is_blurred(self) -> bool:
        """Whether the export that is there has blurred what was found."""
        return "blur" in self.manifest().get("inputs", {})

    def counts(self) -> Exported | None:
        """What the export that is there holds, and what it leaves out; None without one."""
        there = self.manifest()
        return Exported(*(there.get(name, 0) for name in Exported._fields)) if there else None

    def manifest(self) -> dict[str, Any]:
        """What the export that is there was made from, and how much it is; empty when there is
        none, or it is not whole."""
        try:
            found: dict[str, Any] = json.loads(self.out.read(MANIFEST))
        except (FileNotFoundError, ValueError):  # none, or damaged: it is made anew
            return {}
        return found

    def run(self) -> Exported:
        """Write everything anew. Raises ExportError, ReadingError."""
        inputs = self.inputs()  # first: a table that changes from here on outdates the export
        provenance = self._provenance()
        wanted = self._wanted()
        self._start(inputs)
        count = blurred = 0
        left_out = Counter[str]()
        with self.out.writer(LLAVA) as llava, self.out.writer(DENSEFUSION) as dense:
            for record, boxes in self._records(wanted):
                if isinstance(record, str):
                    left_out[record] += 1
                    continue
                blurred += bool(boxes)
                llava.write("[\n" if count == 0 else ",\n")
                llava.write(json.dumps(_llava(record), ensure_ascii=False))
                dense.write(json.dumps({**record, **provenance}, ensure_ascii=False) + "\n")
                count += 1
            llava.write("\n]\n" if count else "[]\n")
        exported = Exported(count, left_out["withheld"], blurred, left_out["unwanted"])
        manifest = {"inputs": inputs, **exported._asdict(), **provenance}
        self.out.put(MANIFEST, json.dumps(manifest, indent=1).encode())
        return exported

    def _wanted(self) -> Selection | None:
        """The rows that are exported, by key; None: all."""
        if not self.where:
            return None
        captioned = self.selected.shards_of(self.captions)
        for table in tables_of(self.where):
            if lacking := captioned - self.selected.shards_of(self.selected.version(table)):
                raise ExportError(
                    f"{self.out.url}: table {table!r}, of export.where, is missing for "
                    f"{len(lacking)} of {len(captioned)} shards that have captions. Run without "
                    "--limit and --only."
                )
        reader = Reader(self.selected)
        return reader.select("key", self.where, allow_missing=True, allow_stale=True)

    def _start(self, inputs: Mapping[str, Any]) -> None:
        """From here on the export that is there is not whole. Lists that were made by other rules,
        and pictures that were blurred by another one or by none, are not left to anyone."""
        shards = self.selected.shards_of(self.captions)
        for table, count in (self.blur.missing(self.selected, shards) if self.blur else {}).items():
            raise ExportError(
                f"{self.out.url}: table {table!r} is missing for {count} of {len(shards)} shards "
                "that have captions. What is to be blurred in their images is not known: run "
                "without --limit and --only."
            )
        before = self.manifest().get("inputs", {})
        self.out.delete(MANIFEST)
        self.out.clean_temporary()
        if any(before.get(rule) != inputs.get(rule) for rule in ("blur", "where")):
            self.out.delete(LLAVA)
            self.out.delete(DENSEFUSION)
        if self.blur and before.get("blur") != inputs["blur"]:
            self.out.delete(IMAGES)
        here = {f"{shard:08d}" for shard in shards}
        for folder in self.out.folders(IMAGES):
            if folder not in here:
                self.out.delete(f"{IMAGES}/{folder}")

    def _provenance(self) -> dict[str, Any]:
        """Which engine, template and models made these captions."""
        revisions: dict[str, Any] = {}
        for table in self.selected.table_names():
            revision = self.selected.version(table).made_by.fields.get("revision")
            if revision:
                revisions[table] = revision
        return {
            "engine": self.captions.split("/", 1)[1],
            "template": self.prompts.split("/", 1)[1],
            "revisions": revisions,
        }

    def _records(
        self, wanted: Selection | None
    ) -> Iterator[tuple[dict[str, Any] | Literal["withheld", "unwanted"], Sequence[Box]]]:
        """Of each captioned sample, or why it is left out; and what is blurred."""
        for shard, captions in self.selected.iterate(self.captions):
            images = self.selected.read_images(shard)
            columns = [
                captions.to_pylist(),
                *(
                    self.selected.read_table(name, shard)[0].to_pylist()
                    for name in ("samples", "hints", self.prompts)
                ),
            ]
            hidden = self.blur.boxes(self.selected, shard) if self.blur else {}
            kept = None if wanted is None else {*wanted.read_shard(shard)["key"].to_pylist()}
            written = set[str]()
            for caption, sample, hints, prompt in zip(*columns, strict=True):
                if caption["status"] != "ok":
                    continue
                key = sample["key"]
                if kept is not None and key not in kept:
                    yield "unwanted", ()
                    continue
                if self.blur and key not in hidden:
                    yield "withheld", ()
                    continue
                boxes = hidden.get(key, [])
                path = self._put_image(shard, sample, images[key], boxes)
                written.add(path)
                record = {
                    "image_id": key,
                    "image_path": path,
                    "caption": caption["caption"],
                    "url": sample["urls"][0] if sample["urls"] else None,
                    "finish": caption["finish"],
                    "hints": json.loads(hints["hints"]),
                    "prompt_sha256": short_hash(prompt["prompt"]),
                    "alt_texts": sample["alt_texts"],
                    "row_ids": sample["row_ids"],
                }
                yield record, boxes
            for path in self.out.files(f"{IMAGES}/{shard:08d}"):
                if path not in written:  # of an earlier export
                    self.out.delete(path)

    def _put_image(
        self, shard: int, sample: Mapping[str, Any], data: bytes, hidden: Sequence[Box]
    ) -> str:
        info = ImageInfo.from_row(sample)
        if self.blur is None:
            extension, data = to_loadable(data, info)
        else:
            # All of them: metadata may hold a thumbnail.
            extension, data = encode(blur(decode(data), hidden), info)
        path = f"{IMAGES}/{shard:08d}/{sample['key']}.{extension}"
        self.out.put(path, data)
        return path


def _llava(record: Mapping[str, Any]) -> dict[str, Any]:
    # A caption may quote the token from a picture; trainers allow exactly one, in the first turn.
    caption = record["caption"].replace("<image>", "< image >")
    return {
        "id": record["image_id"],
        "image": record["image_path"],
        "conversations": [
            {"from": "human", "value": f"<image>\n{INSTRUCTION}"},
            {"from": "gpt", "value": caption},
        ],
    }
