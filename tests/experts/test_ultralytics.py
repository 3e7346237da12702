"""What the expert finds is what ultralytics' own `predict` finds with the same checkpoint; and a
checkpoint can do nothing but be a model."""

import hashlib
import importlib.util
import io
import pickle
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from pydantic import ValidationError

from experts.base import Context, Hardware
from experts.checkpoint import CheckpointError
from experts.detection import ultralytics_export
from experts.detection.ultralytics import (
    Ultralytics,
    UltralyticsConfig,
    UltralyticsOpen,
    read_metadata,
)
from experts.detection.ultralytics_export import ExportError, exported
from experts.onnx import session
from fusion_pipeline.dataset.evidence import DetectedObject, Tag
from fusion_pipeline.dataset.images import RGB, decode
from tests.conftest import Photo
from tests.experts.tiny_ultralytics import ARCHITECTURES, LABELS, SIZE, Seen, ask_library

FLOOR, NMS_IOU = 0.1, 0.5
SETTINGS = {"conf": FLOOR, "iou": NMS_IOU, "max_det": 1000}
TAGS = (3, 1)
"""Numbers of the labels that an image's tags name."""

EXPORTS: dict[str, dict[str, Any]] = {
    "square.onnx": {"model": "yolo11.pt"},
    "rows.onnx": {"model": "yolo26.pt", "nms": False, "dynamic": True},
    "half.onnx": {"model": "yolo11.pt", "quantize": 16, "dynamic": True},
}
"""Files that a user may have exported, in other ways than we do."""


@dataclass(frozen=True)
class Zoo:
    folder: Path
    images: list[RGB]
    seen: dict[str, list[Seen]]
    """By model: what the library sees in each image."""

    def config(self, model: str, **settings: Any) -> UltralyticsConfig:
        settings = {"score_floor": FLOOR, "nms_iou": NMS_IOU, "max_objects": 1000, **settings}
        if model.endswith(".pt"):
            settings |= {"sha256": sha256(self.folder / model), "trust_pickle": True}
            settings.setdefault("image_size", SIZE)
        return UltralyticsConfig(model=str(self.folder / model), **settings)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def turned(image: RGB) -> tuple[bytes, RGB]:
    """A JPEG that lies on its side and says so, and its pixels upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", exif=exif)
    return file.getvalue(), np.ascontiguousarray(np.rot90(np.asarray(Image.open(file)), -1))


@pytest.fixture(scope="module")
def zoo(photo: Photo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    """All checkpoints, and what the library sees with them, asked for in one process."""
    astronaut, coffee, cat = (photo(f"{n}.png") for n in ("astronaut", "coffee", "chelsea"))
    images = [
        astronaut,
        coffee,
        coffee[:, :200],  # upright, and odd paddings
        cat[:7, :300],
        np.full((1, 1, 3), (200, 30, 30), np.uint8),
        turned(coffee)[1],
        np.kron(astronaut, np.ones((8, 10, 1), np.uint8)),  # 21 megapixels
        np.full((90, 120, 3), 127, np.uint8),
    ]
    folder = tmp_path_factory.mktemp("ultralytics")
    models = [*(f"{name}.pt" for name in ARCHITECTURES), *EXPORTS]
    asked = [{"model": model, **SETTINGS} for model in models]
    ends = {"model": "yolo26.pt", "nms": False, "rect": False, "max_det": 300}
    asked[models.index("rows.onnx")] |= ends
    asked.append({"model": "yoloe.pt", "classes": TAGS, **SETTINGS})
    answers = ask_library(folder, [*ARCHITECTURES], EXPORTS, images, asked)
    seen = dict(zip([*models, "yoloe.pt with tags"], answers, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield Zoo(folder, images, seen)


def look(expert: Ultralytics, images: list[RGB], tags: tuple[Tag, ...] = ()) -> list[Any]:
    return expert(images, [Context(i.shape[1], i.shape[0], tags=tags) for i in images])


def assert_same(
    found: list[DetectedObject], seen: Seen, image: RGB, tolerance: float = 1.0
) -> None:
    """One for one: label, score to 1e-4, corners to half a pixel."""
    scale = np.array([image.shape[1], image.shape[0]] * 2)
    # RT-DETR's boxes may reach out of the image, and YOLO's lie in the padding.
    clipped = [(label, score, np.clip(box, 0, scale)) for label, score, box in seen]
    left = [item for item in clipped if (item[2][2:] > item[2][:2]).all()]
    assert len(found) == len(left)
    assert [o.score for o in found] == sorted((o.score for o in found), reverse=True)
    for item in found:
        for at, (label, score, box) in enumerate(left):
            near = abs(score - item.score) < 1e-4 * tolerance
            if label == item.label and near and np.abs(box - item.box * scale).max() < 0.5:
                del left[at]
                break
        else:
            raise AssertionError(f"{item} is not among {left[:5]}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_finds_what_the_library_finds(zoo: Zoo, name: str) -> None:
    expert = Ultralytics(zoo.config(f"{name}.pt"), Hardware())
    found = look(expert, zoo.images)
    for image, objects, seen in zip(zoo.images, found, zoo.seen[f"{name}.pt"], strict=True):
        assert_same(objects, seen, image)
    assert {item.label for objects in found for item in objects} == set(LABELS)
    assert sum(map(len, found)) > 50
    assert expert.batch_size == 1


@pytest.mark.parametrize("name", ["square.onnx", "rows.onnx"])
def test_a_file_that_was_exported_elsewhere(zoo: Zoo, name: str) -> None:
    found = look(Ultralytics(zoo.config(name), Hardware()), zoo.images)
    for image, objects, seen in zip(zoo.images, found, zoo.seen[name], strict=True):
        assert_same(objects, seen, image)
    assert any(found)


def test_a_file_of_half_precision(zoo: Zoo) -> None:
    image, *_ = zoo.images
    [found] = look(Ultralytics(zoo.config("half.onnx"), Hardware()), [image])
    # Equal scores are many, so which of two boxes goes is a matter of chance; the best one stays.
    assert_same(found[:1], zoo.seen["half.onnx"][0][:1], image)
    assert abs(len(found) - len(zoo.seen["yolo11.pt"][0])) < 0.1 * len(found)


def test_images_of_one_shape_are_run_together(zoo: Zoo) -> None:
    images = [zoo.images[0], zoo.images[1], zoo.images[0][::-1], zoo.images[1][:, ::-1]]
    alone = look(Ultralytics(zoo.config("yolo11.pt"), Hardware()), images)
    together = look(Ultralytics(zoo.config("yolo11.pt", batch_size=8), Hardware()), images)
    for image, one, other in zip(images, alone, together, strict=True):
        assert_same(one, [(o.label, o.score, pixels(o, image)) for o in other], image)


def pixels(item: DetectedObject, image: RGB) -> Any:
    return np.array(item.box) * ([image.shape[1], image.shape[0]] * 2)


def test_a_picture_that_lies_on_its_side(zoo: Zoo) -> None:
    """Frames are those of the upright picture."""
    stored, upright = turned(zoo.images[1])
    assert (upright == zoo.images[5]).all()
    [found] = look(Ultralytics(zoo.config("yolo11.pt"), Hardware()), [decode(stored)])
    assert_same(found, zoo.seen["yolo11.pt"][5], upright)
    assert found


def test_limits_are_kept(zoo: Zoo) -> None:
    image, *_ = zoo.images
    [many] = look(Ultralytics(zoo.config("yolo11.pt"), Hardware()), [image])
    [few] = look(Ultralytics(zoo.config("yolo11.pt", max_objects=5), Hardware()), [image])
    [sure] = look(Ultralytics(zoo.config("yolo11.pt", score_floor=0.5), Hardware()), [image])
    [none] = look(Ultralytics(zoo.config("yolo11.pt", score_floor=1), Hardware()), [image])
    assert few == many[:5]
    assert sure == [item for item in many if item.score > 0.5]
    assert sure
    assert none == []


# ---- open set


def test_only_tags_are_looked_for(zoo: Zoo) -> None:
    """As if the library had been told this image's tags, although the classes are all there."""
    config = UltralyticsOpen.Config(**zoo.config("yoloe.pt").model_dump())
    expert = UltralyticsOpen(config, Hardware())
    tags = (Tag("zebra", 0.9), Tag(" BUS", 0.8), Tag("dog", 0.3), Tag("cat", 0.01))
    found = look(expert, zoo.images, tags)
    assert [LABELS[n] for n in TAGS] == ["bus", "dog"]
    for image, objects, seen in zip(zoo.images, found, zoo.seen["yoloe.pt with tags"], strict=True):
        assert_same(objects, seen, image)
    # A place that shows a cat most of all is a dog's, too, when cats are not asked about.
    [every] = look(Ultralytics(zoo.config("yoloe.pt"), Hardware()), zoo.images[:1])
    assert set(found[0]) - set(every)
    assert look(expert, zoo.images[:2], (Tag("zebra", 0.9),)) == [[], []]


def test_queries_beside_the_tags(zoo: Zoo) -> None:
    plain = zoo.config("yoloe.pt").model_dump()
    expert = UltralyticsOpen(
        UltralyticsOpen.Config(**plain, queries=["Coffee  cup"], max_queries=1), Hardware()
    )
    [found] = look(expert, zoo.images[:1], (Tag("zebra", 0.9), Tag("dog", 0.8), Tag("cat", 0.7)))
    assert {item.label for item in found} == {"coffee cup", "dog"}
    with pytest.raises(CheckpointError, match="'unicorn' is no class"):
        UltralyticsOpen(UltralyticsOpen.Config(**plain, queries=["unicorn"]), Hardware())


# ---- checkpoints are pickles


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def was_called(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def armed(path: Path, listener: socket.socket) -> Path:
    """A checkpoint that writes `path.ran` and calls the listener when it is unpickled."""
    program = f"""
open({str(path) + ".ran"!r}, "w").close()
import socket
socket.create_connection({listener.getsockname()!r}).close()
"""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (program,)

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickle.dumps({"model": Payload()}, 2))
        file.writestr("model/version", "3\n")
        file.writestr("model/byteorder", "little")
    return path


def test_without_trust_nothing_is_read_but_the_hash(
    tmp_path: Path, listener: socket.socket
) -> None:
    checkpoint = armed(tmp_path / "best.pt", listener)
    there = sha256(checkpoint)
    with pytest.raises(ValidationError, match=f"sha256: pin the checkpoint: `sha256: {there}` is"):
        UltralyticsConfig(model=str(checkpoint))
    with pytest.raises(ValidationError, match="is a pickle, which may run any program"):
        UltralyticsConfig(model=str(checkpoint), sha256=there)
    with pytest.raises(ValidationError, match="<64 hex digits>"):
        UltralyticsConfig(model=str(tmp_path / "missing.pt"))
    other = UltralyticsConfig(model=str(checkpoint), sha256="0" * 64, trust_pickle=True)
    for use in (Ultralytics.revision, lambda config: Ultralytics(config, Hardware())):
        with pytest.raises(CheckpointError, match=f"its sha256 is {there}, pinned is 0000"):
            use(other)
    assert not Path(f"{checkpoint}.ran").exists()
    assert not was_called(listener)


@pytest.mark.parametrize("library_knows_restricted_loading", [True, False])
def test_a_trusted_checkpoint_runs_nothing_either(
    library_knows_restricted_loading: bool, tmp_path: Path, listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = armed(tmp_path / "best.pt", listener)
    told = "outside the supported"
    if not library_knows_restricted_loading:  # an older one does not see this
        whole = ultralytics_export._environment
        older = {"ULTRALYTICS_SAFE_LOAD": "false"}
        monkeypatch.setattr(ultralytics_export, "_environment", lambda f: {**whole(f), **older})
        told = "opened as a plain pickle"
    config = UltralyticsConfig(model=str(checkpoint), sha256=sha256(checkpoint), trust_pickle=True)
    with pytest.raises(ExportError, match=rf"best\.pt: .*{told}"):
        Ultralytics(config, Hardware())
    assert not Path(f"{checkpoint}.ran").exists()
    assert not was_called(listener)
    assert [path.suffix for path in ultralytics_export.cache_folder().iterdir()] == [".lock"]

    # It does fire where somebody opens it as pickles are opened.
    opening = """
import pickle, sys, zipfile
pickle.loads(zipfile.ZipFile(sys.argv[1]).read("model/data.pkl"))
"""
    subprocess.run([sys.executable, "-c", opening, checkpoint], check=True)
    assert Path(f"{checkpoint}.ran").exists()
    assert was_called(listener)


ESCAPES = {
    "a connection": "import socket; socket.create_connection(('127.0.0.1', port))",
    "a name": "import socket; socket.getaddrinfo('example.org', 80)",
    "a program": "import subprocess; subprocess.run(['true'])",
    "a shell": "import os; os.system('true')",
    "a fork": "import os; os.fork()",
    "a pickle": "import pickle; pickle.loads(pickle.dumps(print))",
}


@pytest.mark.parametrize("attempt", ESCAPES)
def test_what_an_export_may_not_do(attempt: str, listener: socket.socket) -> None:
    program = f"""
from experts.detection.ultralytics_export import confine
confine()
port = {listener.getsockname()[1]}
{ESCAPES[attempt]}
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.returncode == 1
    assert "PermissionError: " in told.stderr
    assert not was_called(listener)


def test_code_that_is_not_python_has_no_way_out_either(listener: socket.socket) -> None:
    """Where the kernel lets users have a network of their own."""
    asked = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    if subprocess.run([sys.executable, "-c", asked]).returncode:
        pytest.skip("no network namespaces here")
    program = f"""
import ctypes, struct, sys
from experts.detection.ultralytics_export import confine
confine()
libc = ctypes.CDLL(None)
address = struct.pack("=H", 2) + struct.pack(">H", {listener.getsockname()[1]}) + b"\\x7f\\0\\0\\1"
sys.exit(libc.connect(libc.socket(2, 1, 0), address + bytes(8), 16) + 1)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert not was_called(listener)


# ---- the cache


def test_workers_that_start_together_export_once(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = zoo.folder / "world.pt"
    runs: list[Any] = []
    run = ultralytics_export._run
    monkeypatch.setattr(ultralytics_export, "_run", lambda *a: (runs.append(a), run(*a))[1])
    with ThreadPoolExecutor(4) as threads:
        wanted = [threads.submit(exported, checkpoint, sha256(checkpoint), SIZE) for _ in range(4)]
        assert {done.result() for done in wanted} == {
            exported(checkpoint, sha256(checkpoint), SIZE)
        }
    assert len(runs) == 1
    made, lock = sorted(ultralytics_export.cache_folder().iterdir())
    assert made.name == f"{sha256(checkpoint)}-{SIZE}-v1.onnx"
    assert lock.name == f"{made.name}.lock"


def test_an_export_that_takes_too_long_is_ended(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ultralytics_export, "_SECONDS", 0.05)
    started = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            started.append(self)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    checkpoint = zoo.folder / "world.pt"
    with pytest.raises(ExportError, match=r"world\.pt: its export took more than"):
        exported(checkpoint, sha256(checkpoint), SIZE)
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert [path.suffix for path in ultralytics_export.cache_folder().iterdir()] == [".lock"]


def test_a_changed_checkpoint_is_not_opened(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ExportError, match="its sha256 is no longer 1111"):
        exported(zoo.folder / "world.pt", "1" * 64, SIZE)


def test_missing_packages_are_named_with_their_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "best.pt").touch()
    with pytest.raises(ExportError, match=r"\[ultralytics\]' \(its licence is AGPL-3\.0"):
        exported(tmp_path / "best.pt", sha256(tmp_path / "best.pt"), None)


def test_an_exported_file_needs_neither_the_library_nor_a_network(zoo: Zoo) -> None:
    """Nor does a checkpoint that was exported before."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "ultralytics", "onnx")))
sys.addaudithook(lambda event, _: event.startswith("socket.") and sys.exit(event))
import numpy as np
from experts.base import Context, Hardware
from experts.detection.ultralytics import Ultralytics, UltralyticsConfig
for settings in ({zoo.config("square.onnx").model_dump()}, {zoo.config("yolo11.pt").model_dump()}):
    expert = Ultralytics(UltralyticsConfig(**settings), Hardware())
    image = np.load({str(zoo.folder / "0.npy")!r})
    assert expert([image], [Context(512, 512)])[0]
"""
    Ultralytics(zoo.config("yolo11.pt"), Hardware())
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


# ---- files and what they say of themselves


GOOD = {"task": "detect", "names": "{0: 'cat', 1: 'dog'}", "stride": "32", "imgsz": "[640, 480]"}


def test_metadata() -> None:
    metadata = read_metadata({**GOOD, "args": "{'nms': None}", "date": "today", "end2end": "True"})
    assert metadata.labels == ["cat", "dog"]
    assert (metadata.stride, metadata.imgsz, metadata.end2end) == (32, (640, 480), True)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"names": "__import__('os').system('touch ran')"}, "unreadable metadata"),
        ({"names": "{0: 'cat', 2: 'dog'}"}, "not numbered from 0"),
        ({"names": "{}"}, "not numbered from 0"),
        ({"names": "{0: 'cat', 1: '\x1b[2J'}"}, "class 1 has no name that can be shown"),
        ({"names": "{0: 'cat', 1: ' '}"}, "class 1 has no name"),
        ({"names": "{0: ['cat']}"}, "names.0: Input should be a valid string"),
        ({"names": "(" * 100_000}, "unreadable metadata"),
        ({"names": "-" * 1_000_000 + "1"}, "unreadable metadata"),
        ({"stride": "0"}, "stride: Input should be greater"),
        ({"task": "pose"}, "task: Input should be 'detect' or 'segment'"),
        ({"imgsz": "640"}, "imgsz: "),
        ({"channels": "10"}, "channels: Input should be 3"),
        ({"args": "{'nms': True}"}, "exported with nms=True"),
    ],
)
def test_hostile_metadata_is_refused(
    changed: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="not a detection model that ultralytics exp") as hit:
        read_metadata({**GOOD, **changed})
    assert told in str(hit.value)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_something_else(zoo: Zoo) -> None:
    with pytest.raises(ValidationError, match=r"neither an \.onnx file nor a \.pt"):
        UltralyticsConfig(model="best.engine")
    with pytest.raises(CheckpointError, match="no such file"):
        Ultralytics.revision(UltralyticsConfig(model=str(zoo.folder / "missing.onnx")))
    with pytest.raises(CheckpointError, match="for an input of 160 x 160 alone"):
        Ultralytics(zoo.config("square.onnx", image_size=320), Hardware())
    nanodet = Path(ultralytics_export.__file__).parents[1] / "assets/nanodet_coco80.onnx"
    with pytest.raises(CheckpointError, match="not a detection model that ultralytics exported"):
        Ultralytics(UltralyticsConfig(model=str(nanodet)), Hardware())


def test_identity(zoo: Zoo, tmp_path: Path) -> None:
    """Of a checkpoint: its hash, the size, our way to export; wherever it lies."""
    config = zoo.config("yolo11.pt")
    there = sha256(config.path)
    assert Ultralytics.revision(config) == f"sha256:{there[:16]}, exported at 160, 1"
    moved = tmp_path / "other.pt"
    moved.write_bytes(config.path.read_bytes())
    other = config.model_copy(update={"model": str(moved)})
    assert Ultralytics.revision(other) == Ultralytics.revision(config)
    assert other.fingerprint_fields() == config.fingerprint_fields()
    assert "model" not in config.fingerprint_fields()


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is one"
)
def test_a_gpu_that_onnx_runtime_cannot_use(zoo: Zoo) -> None:
    with pytest.raises(CheckpointError, match="onnxruntime-gpu in place of onnxruntime"):
        session(zoo.folder / "square.onnx", Hardware(gpu=True))
