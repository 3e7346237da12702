"""Detection models of ultralytics: YOLO, RT-DETR, YOLO-World, YOLOE.

They are run as ONNX files, without the library and without PyTorch. What comes out is what the
library's own `predict` gives, so input and output are prepared the same way: an image keeps its
shape, is made as large as the model's input allows and padded with gray on both sides.

The library and the weights that Ultralytics publishes are under AGPL-3.0 or a paid licence:
docs/ultralytics.md.
"""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError
from experts.detection import ultralytics_export
from experts.detection.queries import TagQueries
from experts.onnx import session
from fusion_pipeline.dataset.evidence import Box, DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

GRAY = (114, 114, 114)
_MOST_CANDIDATES = 30_000
_APART = 7680
"""Pixels by which boxes of one class are moved away from those of the class before it."""
_INPUTS: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class UltralyticsConfig(ExpertConfig):
    model: str = Field(min_length=1)
    """An `.onnx` file that ultralytics exported, or a checkpoint, `.pt`."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of that file. A checkpoint must have it."""
    trust_pickle: bool = False
    """Must be true for a checkpoint: it is a pickle, which may run any program when opened."""
    image_size: int | None = Field(default=None, ge=32, le=8192)
    """Pixels of the input's longer edge. Default: that of training, or of the export."""
    score_floor: float = Field(default=0.15, ge=0.01, le=1)
    """Objects score over it."""
    nms_iou: float = Field(default=0.7, gt=0, le=1)
    """Overlap above which the lesser of two boxes of a class goes. RT-DETR has no use for it."""
    max_objects: int = Field(default=100, ge=1, le=1000)
    """Most objects an image, the best ones."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Images a call. 1 is best on CPUs; GPUs want more."""

    @model_validator(mode="after")
    def _is_pinned(self) -> Self:
        if self.path.suffix not in (".onnx", ".pt"):
            raise ValueError(f"model: {self.model} is neither an .onnx file nor a .pt checkpoint")
        if self.is_pickle and self.sha256 is None:
            there = _sha256(self.path) if self.path.is_file() else "<64 hex digits>"
            raise ValueError(
                f"sha256: pin the checkpoint: `sha256: {there}` is the file that is there now. By "
                "that you say that this file and no other is meant, so compare it with what its "
                "publisher tells"
            )
        if self.is_pickle and not self.trust_pickle:
            raise ValueError(
                f"trust_pickle: {self.model} is a pickle, which may run any program when it is "
                "opened. Set `trust_pickle: true` if you trust who made it (it is opened once, in "
                "a confined process, to make an ONNX file of it), or export it yourself and name "
                "the .onnx file"
            )
        return self

    @property
    def path(self) -> Path:
        return Path(self.model).expanduser()

    @property
    def is_pickle(self) -> bool:
        return self.path.suffix == ".pt"

    def fingerprint_fields(self) -> dict[str, Any]:
        """Without what `Ultralytics.revision` stands for: a file that is moved stays the same."""
        return self.model_dump(mode="json", exclude={"model", "sha256", "trust_pickle"})


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@cache
def _sha256_of(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_sha256(config: UltralyticsConfig) -> str:
    if not config.path.is_file():
        raise CheckpointError(f"{config.model}: no such file")
    found = _sha256(config.path)
    if config.sha256 not in (None, found):
        raise CheckpointError(
            f"{config.model} is not the file that the config pins: its sha256 is {found}, pinned "
            f"is {config.sha256}. If the new one is meant, pin it"
        )
    return found


class Metadata(BaseModel):
    """What ultralytics writes into an ONNX file about the model in it."""

    task: Literal["detect", "segment"]
    head: str = ""
    names: dict[int, str]
    stride: int = Field(ge=1, le=1024)
    imgsz: tuple[int, int]
    """Height and width."""
    channels: Literal[3] = 3
    end2end: bool = False
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if sorted(self.names) != list(range(len(self.names))) or not self.names:
            raise ValueError("names: the classes are not numbered from 0")
        for number, name in self.names.items():
            if not (name.strip() and name.isprintable()):
                raise ValueError(f"names: class {number} has no name that can be shown: {name!r}")
        return self

    @field_validator("args")
    @classmethod
    def _has_no_nms(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("nms"):  # it fails on images in which it finds nothing
            raise ValueError("it was exported with nms=True; export it without, that is done here")
        return value

    @property
    def labels(self) -> list[str]:
        return [self.names[number] for number in range(len(self.names))]

    @property
    def is_stretched(self) -> bool:
        """RT-DETR: the image fills the input, and boxes are fractions of it."""
        return self.head == "RTDETRDecoder"

    @property
    def is_exclusive(self) -> bool:
        """Whether a place has one class only: YOLOE's vocabulary has many words for one thing, so
        the library suppresses across classes there."""
        return self.head.startswith("YOLOE")

    @property
    def gives_rows(self) -> bool:
        """Whether the output is finished: a row an object with box, score, class."""
        return self.is_stretched or self.end2end


def read_metadata(raw: Mapping[str, str]) -> Metadata:
    """Of an ONNX file's text fields, which hold Python literals; nothing in them is run.

    Raises CheckpointError.
    """
    try:
        fields = {
            name: raw[name] if name in ("task", "head") else ast.literal_eval(raw[name])
            for name in Metadata.model_fields
            if name in raw
        }
        return Metadata.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        told = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        told = f"unreadable metadata ({type(error).__name__})"
    raise CheckpointError(
        f"not a detection model that ultralytics exported to ONNX: {told[:300]}"
    ) from None


class Place(NamedTuple):
    """Where an image lies in the model's input, in pixels of it."""

    left: int
    top: int
    width: int
    height: int
    right: int
    """Padding, as below."""
    bottom: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.top + self.height + self.bottom, self.left + self.width + self.right


def place(
    height: int, width: int, size: tuple[int, int], stride: int | None, stretched: bool = False
) -> Place:
    """Of an image in an input of at most `size` (height, width). With a `stride` the input is no
    larger than the image needs, in steps of it."""
    if stretched:
        return Place(0, 0, size[1], size[0], 0, 0)
    scale = min(size[0] / height, size[1] / width)
    inner = max(round(height * scale), 1), max(round(width * scale), 1)
    spare = [outer - used for outer, used in zip(size, inner, strict=True)]
    if stride is not None:
        spare = [pixels % stride for pixels in spare]
    # The odd pixel goes to the right and to the bottom.
    return Place(
        spare[1] // 2, spare[0] // 2, inner[1], inner[0], -(-spare[1] // 2), -(-spare[0] // 2)
    )


def letterbox(image: RGB, where: Place) -> RGB:
    """uint8 [height, width, 3] of the input, the image in its place, gray around it."""
    if image.shape[:2] != (where.height, where.width):
        image = cv2.resize(image, (where.width, where.height), interpolation=cv2.INTER_LINEAR)
    framed: RGB = cv2.copyMakeBorder(
        np.ascontiguousarray(image), where.top, where.bottom, where.left, where.right,
        cv2.BORDER_CONSTANT, value=GRAY,
    )  # fmt: skip
    return framed


class Candidates(NamedTuple):
    corners: Float32
    """[n, 4] (x1, y1, x2, y2)."""
    scores: Float32
    classes: Indices


def suppress(found: Candidates, nms_iou: float, exclusive: bool = False) -> Indices:
    """What non-maximum suppression inside each class (`exclusive`: of all classes) keeps, best
    first.

    Classes are kept apart by moving their boxes, as the library does it: with float32 the overlap
    of boxes of high classes comes out a little rounded, and results are to be the same.
    """
    apart = found.classes.astype(np.float32) * (0 if exclusive else _APART)
    moved = found.corners + apart[:, None]
    x1, y1, x2, y2 = moved.T
    areas = (x2 - x1) * (y2 - y1)
    left = np.argsort(-found.scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
        shared = width.clip(0) * height.clip(0)
        with np.errstate(invalid="ignore"):  # boxes without an area overlap nothing
            overlap = shared / (areas[best] + areas[left] - shared)
        left = left[~(overlap > nms_iou)]
    return np.asarray(kept, np.intp)


@dataclass(frozen=True, slots=True)
class _Job:
    position: int
    place: Place
    classes: Indices
    """What to look for."""


class Ultralytics:
    """Boxes of the model's classes, best first: YOLO11, YOLO12, YOLO26 and their like, RT-DETR, and
    YOLO-World and YOLOE with the classes that they were given before they were saved.

    Code and weights of Ultralytics are under AGPL-3.0 or a paid licence. An image gets an input of
    its own shape, so with `batch_size` above 1 those of a call that have the same shape are run
    together, and their last bits may differ from what each gives alone.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    Config: ClassVar[type[ExpertConfig]] = UltralyticsConfig

    @classmethod
    def revision(cls, config: UltralyticsConfig) -> str:
        found = f"sha256:{_checked_sha256(config)[:16]}"
        if not config.is_pickle:
            return found
        return (
            f"{found}, exported at {config.image_size or 'its size'}, {ultralytics_export.VERSION}"
        )

    def __init__(self, config: UltralyticsConfig, hardware: Hardware) -> None:
        cv2.setNumThreads(hardware.threads)
        path, sha256 = config.path, _checked_sha256(config)
        if config.is_pickle:
            path = ultralytics_export.exported(path, sha256, config.image_size)
        self._config = config
        self._session = session(path, hardware)
        self._metadata = read_metadata(self._session.get_modelmeta().custom_metadata_map)
        self._labels = self._metadata.labels
        self._all = np.arange(len(self._labels))
        model_input = self._session.get_inputs()[0]
        self._input, self._output = model_input.name, self._session.get_outputs()[0].name
        self._dtype = _INPUTS[model_input.type]
        batch, _, *edges = model_input.shape
        fixed = [edge for edge in edges if isinstance(edge, int)]
        self._size = self._input_size(fixed)
        # End-to-end heads take the best 300 cells, and a thin input has fewer.
        whole = fixed or self._metadata.end2end
        self._stride = None if whole else self._metadata.stride
        self.batch_size = config.batch_size
        self.min_short_edge: int | None = max(self._size)
        self._together = 1 if isinstance(batch, int) else config.batch_size
        self._check_output()

    def _input_size(self, fixed: Sequence[int]) -> tuple[int, int]:
        """Height and width; `fixed` are those that a file is bound to, if it is."""
        wanted, stride = self._config.image_size, self._metadata.stride
        if not fixed:
            height, width = (wanted, wanted) if wanted else self._metadata.imgsz
            return -(-height // stride) * stride, -(-width // stride) * stride
        height, width = fixed
        if wanted not in (None, max(fixed)):
            raise CheckpointError(
                f"{self._config.model} was exported for an input of {width} x {height} alone, and "
                f"image_size is {wanted}: leave that out, or export it with dynamic=True"
            )
        return height, width

    def _check_output(self) -> None:
        """Raises CheckpointError when the model is not what its metadata says. Also, a GPU gets
        ready at the first picture."""
        [output] = self._run(np.full((1, *self._size, 3), GRAY[0], np.uint8))
        fields = output.shape[1] if self._metadata.gives_rows else output.shape[0]
        boxes = 6 if self._metadata.gives_rows else 4 + len(self._labels)
        if fields != boxes and not (self._metadata.task == "segment" and fields > boxes):
            raise CheckpointError(
                f"{self._config.model}: {fields} numbers for each box, and {boxes} were expected "
                f"with its {len(self._labels)} classes. Export it again with a newer ultralytics"
            )

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        found: list[list[DetectedObject]] = [[] for _ in images]
        shapes: defaultdict[tuple[int, int], list[_Job]] = defaultdict(list)
        for position, (image, known) in enumerate(zip(images, context, strict=True)):
            height, width = image.shape[:2]
            stretched = self._metadata.is_stretched
            where = place(height, width, self._size, self._stride, stretched)
            classes = self._classes(known)
            if len(classes):
                shapes[where.shape].append(_Job(position, where, classes))
        for jobs in shapes.values():
            for start in range(0, len(jobs), self._together):
                part = jobs[start : start + self._together]
                pixels = np.stack([letterbox(images[job.position], job.place) for job in part])
                for job, output in zip(part, self._run(pixels), strict=True):
                    found[job.position] = self._objects(output, job)
        return found

    def _classes(self, known: Context) -> Indices:
        """What to look for in an image."""
        return self._all

    def _run(self, pixels: npt.NDArray[np.uint8]) -> Float32:
        """The model's output for [n, height, width, 3]."""
        blob = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(self._dtype) / 255
        [output] = self._session.run([self._output], {self._input: blob})
        found: Float32 = output.astype(np.float32, copy=False)
        return found

    def _objects(self, output: Float32, job: _Job) -> list[DetectedObject]:
        if self._metadata.gives_rows:
            found, best = self._rows(output, job.classes)
        else:
            found = self._cells(output, job.classes)
            best = suppress(found, self._config.nms_iou, self._metadata.is_exclusive)
        corners, visible = self._fractions(found.corners[best], job.place)
        return [
            DetectedObject(
                self._labels[found.classes[i]], min(float(found.scores[i]), 1.0), _box(corner)
            )
            for i, corner in zip(best[visible], corners[visible], strict=True)
        ][: self._config.max_objects]

    def _cells(self, output: Float32, classes: Indices) -> Candidates:
        """Of an output [4 + classes (+ more), cells]: each cell's best class of those asked for."""
        scores = output[4 : 4 + len(self._labels)]
        if len(classes) < len(self._labels):
            scores = scores[classes]
        best = scores.max(axis=0)
        cells = np.flatnonzero(best > self._config.score_floor)
        if len(cells) > _MOST_CANDIDATES:
            cells = cells[np.argsort(-best[cells], kind="stable")[:_MOST_CANDIDATES]]
        x, y, width, height = output[:4, cells]
        corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
        return Candidates(corners, best[cells], classes[scores[:, cells].argmax(axis=0)])

    def _rows(self, output: Float32, classes: Indices) -> tuple[Candidates, Indices]:
        """Of an output [rows, 6 (+ more)]: box, score, class; and its rows, best first."""
        numbers = output[:, 5].astype(np.intp)
        rows = (output[:, 4] > self._config.score_floor) & np.isin(numbers, classes)
        corners, scores = output[rows, :4], output[rows, 4]
        if self._metadata.is_stretched:
            half = corners[:, 2:] / 2
            corners = np.concatenate([corners[:, :2] - half, corners[:, :2] + half], axis=1)
        return Candidates(corners, scores, numbers[rows]), np.argsort(-scores, kind="stable")

    def _fractions(self, corners: Float32, where: Place) -> tuple[Float32, npt.NDArray[np.bool_]]:
        """Corners as fractions of the frame, clipped to it, and which of them are in it."""
        if not self._metadata.is_stretched:
            inner = np.array([where.width, where.height] * 2, np.float32)
            corners = (corners - np.array([where.left, where.top] * 2, np.float32)) / inner
        corners = corners.clip(0, 1)
        visible: npt.NDArray[np.bool_] = np.all(corners[:, 2:] > corners[:, :2], axis=1)
        return corners, visible


def _box(corners: Float32) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2


class UltralyticsOpenConfig(UltralyticsConfig, TagQueries):
    """Of the tags only those that are classes of the model are looked for, and counted."""


class UltralyticsOpen(Ultralytics):
    """Boxes of what the image's tags name, best first, of the classes that a YOLO-World or YOLOE
    checkpoint was given before it was saved. An image without a tag among them isn't looked at."""

    uses_tags: ClassVar[bool] = True
    Config: ClassVar[type[ExpertConfig]] = UltralyticsOpenConfig

    def __init__(self, config: UltralyticsOpenConfig, hardware: Hardware) -> None:
        super().__init__(config, hardware)
        self._open = config
        self._numbers: defaultdict[str, list[int]] = defaultdict(list)
        for number, label in enumerate(self._labels):
            self._numbers[_plain(label)].append(number)
        for query in config.queries:
            if _plain(query) not in self._numbers:
                raise CheckpointError(f"queries: {query!r} is no class of {config.model}")

    def _classes(self, known: Context) -> Indices:
        tags = [_plain(tag.label) for tag in known.tags if tag.score >= self._open.tag_threshold]
        named = [label for label in dict.fromkeys(tags) if label in self._numbers]
        wanted = {*named[: self._open.max_queries], *map(_plain, self._open.queries)}
        return np.array(sorted(n for label in wanted for n in self._numbers[label]), np.intp)


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())
