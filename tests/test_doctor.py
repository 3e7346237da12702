"""`fusion doctor`: what is missing is named with its fix, and decides the exit status."""

import json
import sys
from pathlib import Path

import pytest

from fusion_pipeline import cli, doctor
from fusion_pipeline.config import load_config
from fusion_pipeline.doctor import Check, examine
from fusion_pipeline.pipeline import build_pipeline

KEY = "FUSION_TEST_KEY"


def write(tmp_path: Path, engine: str = "composer", folder: str | None = None) -> Path:
    path = tmp_path / "job.yaml"
    place = folder or str(tmp_path)
    path.write_text(
        f"run: {tmp_path}-out/no/such/folder/yet\nsource: {{folder: '{place}'}}\n"
        f"experts: [nanodet]\ncaption: {{engine: {engine}}}\n"
    )
    return path


def checks(path: Path | None) -> dict[str, Check]:
    return {c.name: c for c in examine(build_pipeline(load_config(path)) if path else None)}


def run_doctor(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fusion", "doctor", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_this_installation_is_complete(tmp_path: Path) -> None:
    found = checks(write(tmp_path))
    assert [c for c in found.values() if c.state == "missing"] == []
    assert found["caption engine"].found.startswith("composer")
    assert found["source.folder"].found == str(tmp_path)
    assert str(tmp_path.parent) in found["disk"].found  # the nearest folder that is there
    assert set(checks(None)) < set(found)
    assert all(bool(c.fix) == (c.state != "ok") for c in found.values())


def test_exit_status_follows_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_doctor([str(write(tmp_path)), "--json"], monkeypatch, capsys)
    assert code == 0
    assert {"name", "state", "found", "fix"} == set(json.loads(out)[0])
    away = write(tmp_path, folder=f"{tmp_path}/[away]")
    code, out = run_doctor([str(away)], monkeypatch, capsys)
    assert code == 1
    assert f"no folder {tmp_path}/[away]" in out  # brackets are no markup
    code, out = run_doctor([str(away), "--json"], monkeypatch, capsys)
    assert code == 1
    assert [c["name"] for c in json.loads(out) if c["state"] == "missing"] == ["source.folder"]


def test_a_missing_key_is_named_and_a_present_one_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = f"{{endpoint: {{url: 'http://127.0.0.1:9/v1', model: m, key_env: {KEY}}}}}"
    path = write(tmp_path, engine)
    monkeypatch.delenv(KEY, raising=False)
    missing = checks(path)["caption key"]
    assert (missing.state, missing.found) == ("missing", f"{KEY} is not set")
    assert f"export {KEY}=" in missing.fix
    monkeypatch.setenv(KEY, "sk-secret-987654321")
    code, out = run_doctor([str(path), "--json"], monkeypatch, capsys)
    assert code == 0
    assert "caption key" not in checks(path)
    assert "m at http://127.0.0.1:9/v1" in out
    assert "sk-secret" not in out


def test_missing_models_and_packages_have_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ASSETS", tmp_path)
    monkeypatch.setattr(doctor, "_CORE", ("pyarrow", "no-such-package"))
    found = checks(None)
    assert found["nanodet_coco80.onnx"].state == "missing"
    assert found["no-such-package"].fix == "pip install no-such-package"
    assert found["pyarrow"].state == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "check", "state"),
    [
        ("RAY_AUTH_MODE", "disabled", "Ray authentication", "warn"),
        ("RAY_AUTH_MODE", "token", "Ray authentication", "ok"),
        ("RAY_DASHBOARD_HOST", "0.0.0.0", "Ray dashboard", "warn"),
        ("RAY_DASHBOARD_HOST", "127.0.0.2", "Ray dashboard", "ok"),
        ("RAY_DASHBOARD_HOST", "localhost", "Ray dashboard", "ok"),
        ("RAY_DASHBOARD_HOST", "example.org", "Ray dashboard", "warn"),
    ],
)
def test_open_doors_are_named(
    variable: str, value: str, check: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    found = checks(None)[check]
    assert found.state == state
    assert (variable in found.fix) == (state == "warn")


def test_a_token_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-token")
    _, out = run_doctor([], monkeypatch, capsys)
    assert "from RAY_AUTH_TOKEN" in out
    assert "secret-token" not in out
