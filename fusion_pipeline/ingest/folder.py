"""A folder of images as a source: `a/b.jpg` with its text in `a/b.txt` or `a/b.json`."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from fusion_pipeline.dataset.samples import Limits, cut
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.ingest.rows import (
    IMAGE_EXTENSIONS,
    MAX_METADATA_BYTES,
    MAX_ROW_BYTES,
    MAX_TEXT_BYTES,
    InputRow,
    PlannedShard,
    SourceError,
    first_string,
    parse_metadata,
    parse_text,
)

_TEXTS = ("txt", "json")


def is_input(path: str) -> bool:
    """Whether a file is an image or a text; hidden files are neither."""
    pure = PurePosixPath(path)
    if any(part.startswith(".") for part in pure.parts):
        return False
    return pure.suffix[1:].lower() in IMAGE_EXTENSIONS.union(_TEXTS)


def plan_folder(storage: Storage, limits: Limits) -> Iterator[PlannedShard]:
    """Shards of all images under the root, in the order of their paths; hidden files are left."""
    sizes = storage.sizes("")
    images: dict[str, list[str]] = {}
    texts: dict[str, list[str]] = {}
    for path in filter(is_input, sizes):
        pure = PurePosixPath(path)
        found = texts if pure.suffix[1:].lower() in _TEXTS else images
        found.setdefault(str(pure.with_suffix("")), []).append(path)
    rows: list[tuple[str, ...]] = []
    for stem in sorted(images.keys() | texts.keys()):
        for image in images.get(stem, [""]):  # a text without an image is a row, too
            rows.append((image, *texts.get(stem, ())))
    if not rows:
        known = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise SourceError(f"source.folder: no images under {storage.url} (looked for {known})")
    for part in cut((sizes.get(row[0], 0) for row in rows), limits):
        yield PlannedShard("", rows=len(part), files=tuple(rows[i] for i in part))


def read_folder_rows(storage: Storage, part: PlannedShard) -> Iterator[InputRow]:
    for files in part.files:
        try:
            if files[0] and (size := storage.size(files[0])) > MAX_ROW_BYTES:
                yield InputRow("", files[0], None, None, None, damaged=f"{size:,} bytes")
            else:
                yield _row(storage, *files)
        except (FileNotFoundError, PermissionError) as error:
            name = files[0] or files[1]
            yield InputRow("", name, None, None, None, damaged=type(error).__name__)


def _row(storage: Storage, image: str, *texts: str) -> InputRow:
    text, url = None, None
    for path in texts:
        if path.lower().endswith(".txt"):
            text = parse_text(storage.read_range(path, 0, MAX_TEXT_BYTES)) or text
        else:
            metadata = parse_metadata(storage.read_range(path, 0, MAX_METADATA_BYTES + 1))
            url = first_string(metadata, "url", "URL")
            text = text or first_string(metadata, "caption", "TEXT", "text")
    return InputRow(
        source="",
        source_id=image or texts[0],
        image=storage.read(image) if image else None,
        alt_text=text or None,
        url=url,
    )
