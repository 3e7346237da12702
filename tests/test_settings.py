"""The list of settings is whole, and says what the models say."""

import json
from collections.abc import Iterator

import yaml

from fusion_pipeline.config import Config
from fusion_pipeline.settings import Setting, settings

FOUND = {setting.name: setting for setting in settings()}


def test_every_setting_says_what_it_means() -> None:
    assert [name for name, setting in FOUND.items() if len(setting.meaning) < 8] == []


def test_a_setting() -> None:
    assert FOUND["select.copies.propose"] == Setting(
        "select.copies.propose",
        "float >= -1 <= 1",
        "0.75",
        "Cosine similarity from which a pair is looked at. Low: the pixel check decides.",
    )
    assert FOUND["runner.workers"].values == "int >= 1 | null"
    assert FOUND["caption.engine.endpoint.detail"].values == "auto | low | high | null"
    assert FOUND["experts.owlv2.model"].default is None
    assert FOUND["experts.*.hosting.gpus"].default == "0.0"
    assert FOUND["blur.experts"].meaning.endswith("Settings as below `experts`.")


def test_all_that_a_resolved_config_has_is_listed() -> None:
    """With the defaults that are listed."""
    config = Config.model_validate({"run": "out", "source": {"folder": "in"}})
    plain = yaml.safe_load(config.to_yaml())

    def leaves(place: str, value: object) -> Iterator[tuple[str, object]]:
        if place in FOUND or not isinstance(value, dict):
            yield place, value
            return
        for name, below in value.items():
            yield from leaves(f"{place}.{name}".lstrip("."), below)

    given = {"run", "source.folder", "caption.engine.name"}
    # Lists of experts, and what is null or false as a whole.
    given |= {"experts", "blur", "relevance", "caption.sample"}
    for name, value in leaves("", plain):
        if name not in given:
            assert json.loads(FOUND[name].default or "") == value, name
