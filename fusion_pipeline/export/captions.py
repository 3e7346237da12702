"""Captioned samples in the formats that trainers read (LLaVA JSON, DenseFusion JSONL).

export/llava.json          a list of {id, image, conversations}
export/densefusion.jsonl   image_id, image_path, caption, url; ours adds hints and provenance
export/images/<shard>/     upright JPEG or PNG; paths in both files are relative to export/
export/manifest.json       what it was made from
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusion_pipeline.dataset.artifacts import inputs_of
from fusion_pipeline.dataset.fingerprints import short_hash
from fusion_pipeline.dataset.images import ImageInfo, to_loadable
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.storage import Storage

VERSION = 1
MANIFEST = "manifest.json"
INSTRUCTION = "Describe this image in detail."
"""The human turn; LLaVA's plain stages drop it."""


@dataclass(frozen=True)
class Export:
    selected: Dataset
    captions: str
    """Table of captions, for example `captions/composer`."""
    prompts: str
    out: Storage

    def inputs(self) -> dict[str, Any]:
        tables = ("samples", "hints", self.prompts, self.captions)
        return {"version": VERSION, **inputs_of(self.selected, tables)}

    def is_current(self) -> bool:
        try:
            manifest = json.loads(self.out.read(MANIFEST))
        except FileNotFoundError:
            return False
        return bool(manifest["inputs"] == self.inputs())

    def run(self) -> int:
        """Write everything anew; returns the number of captioned samples."""
        inputs = self.inputs()  # first: a table that changes from here on outdates the export
        provenance = self._provenance()
        self.out.delete(MANIFEST)
        count = 0
        with self.out.writer("llava.json") as llava, self.out.writer("densefusion.jsonl") as dense:
            for record in self._records():
                llava.write("[\n" if count == 0 else ",\n")
                llava.write(json.dumps(_llava(record), ensure_ascii=False))
                dense.write(json.dumps({**record, **provenance}, ensure_ascii=False) + "\n")
                count += 1
            llava.write("\n]\n" if count else "[]\n")
        manifest = {"inputs": inputs, "samples": count, **provenance}
        self.out.put(MANIFEST, json.dumps(manifest, indent=1).encode())
        return count

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

    def _records(self) -> Iterator[dict[str, Any]]:
        for shard, captions in self.selected.iterate(self.captions):
            images = self.selected.read_images(shard)
            columns = [
                captions.to_pylist(),
                *(
                    self.selected.read_table(name, shard)[0].to_pylist()
                    for name in ("samples", "hints", self.prompts)
                ),
            ]
            for caption, sample, hints, prompt in zip(*columns, strict=True):
                if caption["status"] != "ok":
                    continue
                path = self._put_image(shard, sample, images[sample["key"]])
                yield {
                    "image_id": sample["key"],
                    "image_path": path,
                    "caption": caption["caption"],
                    "url": sample["urls"][0] if sample["urls"] else None,
                    "finish": caption["finish"],
                    "hints": json.loads(hints["hints"]),
                    "prompt_sha256": short_hash(prompt["prompt"]),
                    "alt_texts": sample["alt_texts"],
                    "row_ids": sample["row_ids"],
                }

    def _put_image(self, shard: int, sample: Mapping[str, Any], data: bytes) -> str:
        extension, data = to_loadable(data, ImageInfo.from_row(sample))
        path = f"images/{shard:08d}/{sample['key']}.{extension}"
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
