"""The command line and the lineage of a model that the run serves itself."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fusion_pipeline.fuse.engines import EngineChoice
from fusion_pipeline.fuse.servers import ServerError
from fusion_pipeline.fuse.vllm import VllmConfig, server_command


def arguments(config: VllmConfig, tmp_path: Path) -> str:
    vllm = tmp_path / "vllm"
    vllm.touch()
    found = server_command(config.model_copy(update={"command": str(vllm)}))
    assert found.arguments[0] == str(vllm)
    return " ".join(found.arguments[1:])


def test_a_known_model_needs_no_more_than_its_name(tmp_path: Path) -> None:
    choice = EngineChoice.model_validate({"vllm": "llava-hf/llava-v1.6-mistral-7b-hf"})
    assert choice.name == "llava-v1.6-mistral-7b-hf"
    assert choice.vllm is not None
    assert choice.vllm.image_max_edge == 1008
    assert arguments(choice.vllm, tmp_path) == (
        "serve llava-hf/llava-v1.6-mistral-7b-hf "
        "--served-model-name llava-v1.6-mistral-7b-hf --disable-uvicorn-access-log "
        '--limit-mm-per-prompt {"image": 1} --mm-processor-cache-gb 0 --max-model-len 8192'
    )


def test_options_are_passed_on(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 48}')
    config = VllmConfig.model_validate(
        {
            "model": "Qwen/Qwen2.5-VL-7B-Instruct",
            "revision": "abc123",
            "tensor_parallel": 2,
            "lora": str(adapter),
            "serve": {"max_num_seqs": 64, "enable_prefix_caching": False, "max_model_len": 9000},
        }
    )
    line = arguments(config, tmp_path)
    assert "--revision abc123 --tensor-parallel-size 2 --enable-lora --lora-modules " in line
    assert json.dumps({"name": "adapter", "path": str(adapter)}) + " --max-lora-rank 64" in line
    assert "--max-num-seqs 64 --no-enable-prefix-caching" in line
    assert "--max-model-len 9000" in line
    assert config.served_name == "adapter"


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        ({"host": "0.0.0.0"}, "host is set by the run"),
        ({"--max-num-seqs": 8}, "is no option"),
        ({"hf_token": "hf_1"}, "set an environment variable"),
        ({"data_parallel_size": 2}, "is set by the run"),
    ],
)
def test_what_the_run_sets_itself_is_refused(serve: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VllmConfig.model_validate({"model": "some/model", "serve": serve})


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(ValidationError, match="family: none is called 'lava'; known: internvl"):
        VllmConfig.model_validate({"model": "some/model", "family": "lava"})


def test_other_weights_are_another_lineage(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(20 * 2**20))
    (folder / "config.json").write_text("{}")

    def lineage(**more: object) -> dict[str, object]:
        return VllmConfig.model_validate({"model": str(folder), **more}).fingerprint_fields()

    before = lineage()
    assert lineage(serve={"max_num_seqs": 8}, replicas=3, concurrency=5) == before
    assert lineage(serve={"quantization": "fp8"}) != before
    assert lineage(max_tokens=100) != before
    with weights.open("r+b") as file:  # somewhere in the middle, as fine-tuning does everywhere
        file.seek(20 * 2**20 // 63 * 30)
        file.write(b"1" * 2**16)
    assert lineage() != before


def test_a_moved_folder_is_the_same_model_and_an_edited_template_is_not(tmp_path: Path) -> None:
    template = tmp_path / "turns.jinja"
    template.write_text("{{ messages }}")
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "model" / "config.json").write_text("{}")

    def lineage(folder: str) -> dict[str, object]:
        serve = {"chat_template": str(template)}
        return VllmConfig(model=str(tmp_path / folder), serve=serve).fingerprint_fields()

    before = lineage("a/model")
    (tmp_path / "a").rename(tmp_path / "b")
    assert lineage("b/model/") == before
    template.write_text("{{ messages[0] }}")
    assert lineage("b/model") != before


def test_a_repository_that_brings_code_is_not_trusted_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"serve: \{trust_remote_code: true\}"):
        arguments(VllmConfig(model="anybody/InternVL3-8B"), tmp_path)
    read = VllmConfig(model="OpenGVLab/InternVL3-8B", serve={"trust_remote_code": True})
    assert "--trust-remote-code" in arguments(read, tmp_path)


def test_a_folder_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no such folder"):
        VllmConfig(model=str(tmp_path / "missing")).fingerprint_fields()


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerError, match=r"pip install 'fusion-pipeline\[serve\]'"):
        server_command(VllmConfig(model="some/model"))
