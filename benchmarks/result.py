"""How every benchmark ends: a table for people, one JSON line, a file in benchmarks/results/."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def finish(
    name: str,
    value: float,
    unit: str,
    target: float,
    ok: bool,
    rows: list[dict[str, Any]],
    details: dict[str, Any] | None = None,
) -> None:
    """Print the rows and the verdict; keep both with commit and machine.

    `rows`: the measurements, all with the same fields.
    """
    table = Table(title=name)
    for field in rows[0]:
        table.add_column(field, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=110).print(table)
    verdict = {"name": name, "value": round(value, 4), "unit": unit, "target": target, "ok": ok}
    record = {
        **verdict,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "rows": rows,
        **(details or {}),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(verdict))


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS)
        return done.stdout.strip()

    own = ":(top,exclude)benchmarks/results"  # an earlier benchmark's result is no change
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", own)
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def _machine() -> dict[str, Any]:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    cpus = len(os.sched_getaffinity(0))
    return {"cpu": model, "cpus": cpus, "python": platform.python_version()}
