"""The `fusion` command over a tiny folder of pictures, in this process and without Ray."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fusion_pipeline.cli import main
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.pipeline import build_pipeline
from tests.dataset.version1 import put_back
from tests.toy import files_of, seen_by_readers

COMMANDS = ["run", "caption", "status", "report", "migrate", "demo-data", "config", "doctor"]
EXPERT = "tags/efficientnet-lite2"
PICTURES = 6


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str


Fusion = Callable[..., Shown]


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fusion:
    def call(*arguments: object) -> Shown:
        monkeypatch.setattr(sys, "argv", ["fusion", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return Shown(code, shown.out, shown.err)

    return call


def picture(path: Path, seed: int) -> None:
    """Large coloured fields: no two pictures are alike."""
    fields = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(np.kron(fields, np.ones((20, 20, 1), np.uint8))).save(path)


@dataclass(frozen=True)
class Job:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "job.yaml"

    @property
    def pool(self) -> Dataset:
        return Dataset(self.root / "out" / "pool")

    @property
    def selected(self) -> Dataset:
        return Dataset(self.root / "out" / "selected")

    def files(self) -> dict[str, tuple[int, bytes]]:
        """Time of writing and content of whatever a run makes, its logs aside."""
        found = {}
        for path in sorted((self.root / "out").rglob("*")):
            name = str(path.relative_to(self.root / "out"))
            if path.is_file() and "/runs/" not in name and "/.tmp/" not in name:
                found[name] = (path.stat().st_mtime_ns, path.read_bytes())
        return found


def write_job(root: Path) -> Job:
    (root / "in").mkdir(parents=True)
    for i in range(PICTURES):
        picture(root / "in" / f"{i}.png", i)
        (root / "in" / f"{i}.txt").write_text(f"picture number {i}")
    settings = {
        "run": str(root / "out"),
        "source": {"folder": str(root / "in"), "shard_size": 2},
        "filter": {"min_short_edge": 16},
        "select": {"clusters": 2, "shard_size": 2, "duplicates": {"rule": "off"}},
        "experts": ["efficientnet-lite2"],
        "report": {"cards": 2, "groups": 1},
    }
    (root / "job.yaml").write_text(yaml.safe_dump(settings))
    return Job(root)


@pytest.fixture
def fresh(tmp_path: Path) -> Job:
    return write_job(tmp_path / "fresh")


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = write_job(tmp_path_factory.mktemp("finished"))
    command = [sys.executable, "-m", "fusion_pipeline", "run", str(job.config), "--no-ray"]
    subprocess.run(command, check=True, capture_output=True)
    return job


@pytest.fixture
def done(_finished: Job, tmp_path: Path, fusion: Fusion) -> Job:
    """A finished run, to change at will: a copy. Only its report names the place, so only that is
    written anew: a dataset may be moved."""
    root = tmp_path / "done"
    shutil.copytree(_finished.root, root)
    text = _finished.config.read_text().replace(str(_finished.root), str(root))
    (root / "job.yaml").write_text(text)
    moved = Job(root).files()
    assert fusion("run", root / "job.yaml", "--no-ray").code == 0
    assert changed(moved, Job(root).files()) <= {"report.html"}
    return Job(root)


def rewritten(
    before: dict[str, tuple[int, bytes]], after: dict[str, tuple[int, bytes]]
) -> set[str]:
    """Files that were written again, came or went. Whoever writes takes the lease and puts its
    name into the tables' descriptors: those count only when they say something else to readers."""

    def of(files: dict[str, tuple[int, bytes]], name: str) -> object:
        if name.endswith(("/table.json", "/artifact.json")) and name in files:
            return seen_by_readers({name: files[name][1]})
        return files.get(name)

    names = {n for n in before.keys() | after.keys() if of(before, n) != of(after, n)}
    return {n for n in names if not n.endswith("/lease.json")}


def changed(before: dict[str, tuple[int, bytes]], after: dict[str, tuple[int, bytes]]) -> set[str]:
    """Tables with a file that was written again, came or went; other files by their folder."""
    version = re.compile(r"/(table\.json|artifact\.json|v-[0-9a-f]{8}[-/.].*)$")
    found = rewritten(before, after)
    return {version.sub("", n) if version.search(n) else "/".join(n.split("/")[:-1]) or n
            for n in found}  # fmt: skip


# Help, errors, output for programs


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str, fusion: Fusion) -> None:
    shown = fusion(command, "--help")
    assert shown.code == 0
    assert f"Example: fusion {command} " in shown.out
    text = " ".join(shown.out.split())
    example = text.split("Example: ")[1].split("--help")[0].split()
    assert example[:2] == ["fusion", command]
    if example[2].startswith("configs/"):
        assert (Path(__file__).parent.parent / example[2]).is_file()


def test_all_commands_are_listed(fusion: Fusion) -> None:
    shown = fusion()
    assert all(command in shown.out + shown.err for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "JOB", "select.cluster=3"], "did you mean 'clusters'"),
        (["run", "JOB", "--no-ray", "--until", "captoins"], "no step is called 'captoins'; steps:"),
        (["run", "JOB", "--no-ray", "source.folder=/no/such/place"], "source.folder: nothing foun"),
        (["run", "JOB", "--no-ray", "filter.min_short_edge=9000"], "`fusion status` says why"),
        (["status", "JOB", "nonsense"], "expected key=value"),
    ],
)
def test_errors_are_one_message_and_status_1(
    arguments: list[str], message: str, fresh: Job, fusion: Fusion
) -> None:
    shown = fusion(*(str(fresh.config) if a == "JOB" else a for a in arguments))
    assert shown.code == 1
    assert "error: " in shown.err
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_an_error_leaves_the_process_with_status_1_and_no_trace(fresh: Job) -> None:
    command = [sys.executable, "-m", "fusion_pipeline", "run", str(fresh.config), "x.y=1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "job.yaml: x: unknown setting" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    "step",
    ["resolution", "embeddings", "centroids", "clusters", "selection", "repack", EXPERT, "hints",
     "prompts/engine-v1", "captions/composer", "export", "report"],
)  # fmt: skip
def test_a_step_without_its_inputs_says_so_and_leaves_nothing(
    step: str, fresh: Job, fusion: Fusion
) -> None:
    shown = fusion("run", fresh.config, "--no-ray", "--only", step)
    assert shown.code == 1
    assert "is not there yet. Run the steps before this one first" in shown.err
    assert not list(fresh.root.glob("out/**/tables/**/*.parquet"))
    assert not fresh.selected.exists


def test_config_prints_what_can_be_run_again(fresh: Job, fusion: Fusion, tmp_path: Path) -> None:
    shown = fusion("config", fresh.config, "select.per_cluster=7")
    (tmp_path / "again.yaml").write_text(shown.out)
    assert "per_cluster: 7" in shown.out
    assert fusion("config", tmp_path / "again.yaml").out == shown.out
    as_json = json.loads(fusion("config", fresh.config, "select.per_cluster=7", "--json").out)
    assert as_json == yaml.safe_load(shown.out)


# Runs


def test_a_run_makes_everything_and_the_next_nothing(done: Job, fresh: Job, fusion: Fusion) -> None:
    before = done.files()
    for name in ("report.html", "export/llava.json", "export/densefusion.jsonl"):
        assert name in before
    lines = before["export/densefusion.jsonl"][1].decode().splitlines()
    assert len(lines) == PICTURES
    again = fusion("run", done.config, "--no-ray")
    assert again.code == 0
    assert "Nothing to do: every step is complete." in again.err
    assert str(done.root / "out" / "report.html") in again.err
    assert done.files() == before
    shown = fusion("run", fresh.config, "--no-ray")
    assert shown.code == 0
    for step in ("ingest", "embeddings", "selection", "repack", EXPERT, "export"):
        assert step in shown.err
    for mine, other in ((fresh.pool, done.pool), (fresh.selected, done.selected)):
        assert set(files_of(Path(mine.storage.root))) == set(files_of(Path(other.storage.root)))


def test_nothing_to_do_is_found_out_without_ray(done: Job) -> None:
    code = (
        "import sys; from fusion_pipeline.cli import main\n"
        f"sys.argv = ['fusion', 'run', {str(done.config)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('ray' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Nothing to do" in shown.stderr
    assert shown.stdout.split()[-1] == "False"


def test_status_counts_every_row(done: Job, fresh: Job, fusion: Fusion) -> None:
    counts = json.loads(fusion("status", done.config, "--json").out)
    pool = {table["table"]: table for table in counts["pool"]}
    assert list(pool) == [
        "sources", "samples", "resolution", "embeddings", "clusters", "selection",
    ]  # fmt: skip
    for table in counts["pool"] + counts["selected"]:
        assert table["rows"] == sum(table["counts"].values()) == PICTURES
        assert table["shards"] == 3
    assert [t["table"] for t in counts["selected"]][-1] == "captions/composer"
    people = fusion("status", done.config)
    assert "captions/composer" in people.out
    nothing = fusion("status", fresh.config, "--json")
    assert (nothing.code, nothing.out) == (1, "")
    assert "is no dataset" in nothing.err
    assert not (fresh.root / "out").exists()  # looking makes nothing


def test_until_and_only(fresh: Job, fusion: Fusion) -> None:
    assert fusion("run", fresh.config, "--no-ray", "--until", "resolution").code == 0
    assert fresh.pool.table_names() == ["resolution", "samples", "sources"]
    assert not fresh.selected.exists
    shown = fusion("run", fresh.config, "--no-ray", "--only", "embeddings")
    assert shown.code == 0
    assert fresh.pool.table_names() == ["embeddings", "resolution", "samples", "sources"]
    assert "ingest" not in shown.err


def test_limit_takes_whole_shards(fresh: Job, fusion: Fusion) -> None:
    assert fusion("run", fresh.config, "--no-ray", "--until", "resolution", "--limit", 3).code == 0
    assert fresh.pool.shards() == [0, 1]  # two samples each: three need two shards
    assert fresh.pool.shards_of("resolution") == {0, 1}
    before = fresh.files()
    assert fusion("run", fresh.config, "--no-ray", "--until", "resolution").code == 0
    assert fresh.pool.shards() == [0, 1, 2]  # the rest is done later
    assert rewritten(before, fresh.files()).isdisjoint(before)
    assert fusion("run", fresh.config, "--no-ray", "--limit", 0).code == 2  # usage


def test_other_settings_are_refused_and_overwrite_redoes_what_hangs_on_them(
    done: Job, fusion: Fusion
) -> None:
    change = "hints.tag_threshold=0.9"
    before = done.files()
    refused = fusion("run", done.config, "--no-ray", change)
    assert refused.code == 1
    assert "config.tag_threshold" in refused.err
    assert "--overwrite" in refused.err
    assert done.files() == before
    assert fusion("run", done.config, "--no-ray", change, "--overwrite").code == 0
    redone = changed(before, done.files())
    assert {name for name in redone if name.startswith("pool")} == set()
    assert {name for name in redone if name.startswith("selected/")} == {
        f"selected/tables/{name}" for name in ("hints", "prompts/engine-v1", "captions/composer")
    }
    assert "report.html" in redone
    after = done.files()
    assert "Nothing to do" in fusion("run", done.config, "--no-ray", change, "--overwrite").err
    assert done.files() == after


def test_overwrite_of_one_step_keeps_the_others(done: Job, fusion: Fusion) -> None:
    """A changed expert is not dropped by a run that was not asked to redo it."""
    before = done.files()
    change = "experts=[efficientnet-lite2: {score_floor: 0.11}]"
    shown = fusion("run", done.config, "--no-ray", change, "--only", "hints", "--overwrite")
    assert shown.code == 1
    tags = {name: file for name, file in before.items() if EXPERT in name}
    assert len(tags) >= 3
    assert {name: done.files().get(name) for name in tags} == tags


def test_a_higher_limit_of_size_redoes_the_pool_alone(done: Job, fusion: Fusion) -> None:
    before = done.files()
    arguments = ("--no-ray", "filter.min_short_edge=40", "--until", "resolution", "--overwrite")
    assert fusion("run", done.config, *arguments).code == 0
    assert changed(before, done.files()) == {"pool/tables/resolution"}


def test_a_changed_source_needs_refresh(done: Job, fusion: Fusion) -> None:
    before = done.files()
    picture(done.root / "in" / "new.png", 99)
    refused = fusion("run", done.config, "--no-ray")
    assert refused.code == 1
    assert "what 'ingest' reads changed since this dataset was planned" in refused.err
    assert "--refresh" in refused.err
    assert done.files() == before
    assert fusion("run", done.config, "--no-ray", "--refresh").code == 0
    counts = json.loads(fusion("status", done.config, "--json").out)
    assert [table["rows"] for table in counts["pool"]] == [PICTURES + 1] * 6
    exported = json.loads((done.root / "out" / "export" / "llava.json").read_text())
    assert len(exported) == PICTURES + 1
    assert "Nothing to do" in fusion("run", done.config, "--no-ray").err


def test_a_source_that_is_away_costs_nothing(done: Job, fusion: Fusion) -> None:
    """A disk that is not mounted must not empty the dataset, whatever was asked for."""
    before = done.files()
    (done.root / "in").rename(done.root / "elsewhere")
    for options in (["--overwrite"], ["--refresh"], []):
        shown = fusion("run", done.config, "--no-ray", *options)
        assert shown.code == 1
        assert "source.folder: nothing found at" in shown.err
        assert done.files() == before


def test_retry_failed_does_failed_rows_again(
    fresh: Job, fusion: Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts.tagging.efficientnet_lite2 import EfficientNetLite2Tagger

    well = EfficientNetLite2Tagger.__call__
    seen: list[int] = []

    def sick(self, images, context):  # type: ignore[no-untyped-def]
        seen.append(len(images))
        if any("number 3" in text for c in context for text in c.alt_texts):
            raise ValueError("sick")
        return well(self, images, context)

    monkeypatch.setattr(EfficientNetLite2Tagger, "__call__", sick)
    assert fusion("run", fresh.config, "--no-ray").code == 0
    assert status_of(fresh, fusion, EXPERT) == {"ok": PICTURES - 1, "failed:ValueError": 1}
    assert status_of(fresh, fusion, "captions/composer")[f"filtered:upstream:{EXPERT}"] == 1
    seen.clear()
    assert "Nothing to do" in fusion("run", fresh.config, "--no-ray").err
    assert seen == []
    monkeypatch.setattr(EfficientNetLite2Tagger, "__call__", well)
    before = fresh.files()
    assert fusion("run", fresh.config, "--no-ray", "--retry-failed").code == 0
    assert status_of(fresh, fusion, EXPERT) == {"ok": PICTURES}
    assert status_of(fresh, fusion, "captions/composer") == {"ok": PICTURES}
    again = rewritten(before, fresh.files())
    assert len([name for name in again if EXPERT in name]) == 1  # one shard of three
    assert not [name for name in again if name.startswith("pool/")]


def test_migrate_lifts_a_run_of_an_older_fusion(done: Job, fusion: Fusion) -> None:
    put_back(build_pipeline(load_config(done.config)))
    out = done.root / "out"
    for command in ("run", "status", "report"):
        refused = fusion(command, done.config)
        assert refused.code == 1
        assert f"fusion migrate {out}/pool" in refused.err
    shown = fusion("migrate", out)
    assert shown.code == 0
    assert shown.out.splitlines() == [
        f"{out}/pool: format version 1 -> 2", f"{out}/selected: format version 1 -> 2",
    ]  # fmt: skip
    assert "Nothing to do: every step" in fusion("run", done.config, "--no-ray").err
    assert "version 2: nothing to do" in fusion("migrate", out / "selected").out
    nowhere = fusion("migrate", done.root / "nowhere")
    assert (nowhere.code, nowhere.out) == (1, "")
    assert "is no dataset" in nowhere.err
    assert not (done.root / "nowhere").exists()


def status_of(job: Job, fusion: Fusion, table: str) -> dict[str, int]:
    counts = json.loads(fusion("status", job.config, "--json").out)
    (found,) = [t for t in counts["pool"] + counts["selected"] if t["table"] == table]
    result: dict[str, int] = found["counts"]
    return result


def test_report_is_written_anew(done: Job, fusion: Fusion) -> None:
    page = done.root / "out" / "report.html"
    page.unlink()
    shown = fusion("report", done.config)
    assert shown.out.strip() == str(page)
    assert "captions" in page.read_text()


def test_a_report_of_no_run_is_an_error(fresh: Job, fusion: Fusion) -> None:
    shown = fusion("report", fresh.config, f"run={fresh.root}-mistyped")
    assert shown.code == 1
    assert "is no dataset" in shown.err
    assert not Path(f"{fresh.root}-mistyped").exists()


def test_a_stage_that_gave_nothing_ends_with_status_1(fresh: Job, fusion: Fusion) -> None:
    dead = '{endpoint: {url: "http://127.0.0.1:9/v1", model: m, key_env: null, max_retries: 0}}'
    for committed in (True, False):  # the second time nothing is left to do, but to mend it
        shown = fusion("run", fresh.config, "--no-ray", f"caption.engine={dead}")
        assert shown.code == 1
        assert ("Nothing to do" in shown.err) != committed
        assert "failed: captions/m: " in shown.err
        assert "connection" in shown.err
        assert "--retry-failed" in shown.err
