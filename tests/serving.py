"""A real `vllm serve` on the CPU, with a tiny model of the real architecture."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
VLLM = ROOT / ".venv-serve" / "bin" / "vllm"
"""Missing: `make .venv-serve/.done`. It is in an environment of its own."""
SERVE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 8192,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 * 2**20,
    "gpu_memory_utilization": 0.3,
}
"""What fits a laptop."""


def make_tiny_model(folder: Path) -> Path:
    assert VLLM.is_file(), "vLLM is not there: make .venv-serve/.done"
    script = ROOT / "fusion_pipeline" / "demo" / "tiny_llava.py"
    subprocess.run([VLLM.with_name("python"), script, folder], check=True, capture_output=True)
    return folder
