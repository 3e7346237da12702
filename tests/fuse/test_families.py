"""Model families: every file holds together, and a hub id finds the right one."""

import re

import pytest
import yaml
from pydantic import ValidationError

from fusion_pipeline.fuse import families as module
from fusion_pipeline.fuse.endpoint import EndpointConfig
from fusion_pipeline.fuse.families import Family, families, family_of
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.prompts.render import render

ALL = pytest.mark.parametrize("family", families(), ids=lambda family: family.name)


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5"),
        ("liuhaotian/llava-v1.5-13b", "llava-1.5"),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-next-vicuna"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "llava-next-mistral"),
        ("Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int4", "qwen2-vl"),
        ("Qwen/Qwen2.5-VL-72B-Instruct-AWQ", "qwen2.5-vl"),
        ("qwen/qwen2.5-vl-32b-instruct:free", "qwen2.5-vl"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3-vl"),
        ("OpenGVLab/InternVL2_5-8B-MPO", "internvl2.5"),
        ("OpenGVLab/InternVL3-78B", "internvl3"),
        ("/models/InternVL3-8B/", "internvl3"),
        # Near, but with another tokenizer or another chat format.
        ("OpenGVLab/InternVL2-8B", None),
        ("OpenGVLab/InternVL3_5-8B", None),
        ("llava-hf/llava-v1.6-34b-hf", None),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", None),
        ("Qwen/Qwen2.5-7B-Instruct", None),
        ("gpt-4o", None),
        ("", None),
    ],
)
def test_family_of_a_model(model: str, family: str | None) -> None:
    found = family_of(model)
    assert (found and found.name) == family


@ALL
def test_a_model_has_one_family(family: Family) -> None:
    for pattern in family.models:
        found = family_of("owner/" + pattern.replace("*", "7b"))
        assert found == family


@ALL
def test_the_turn_holds_one_image_and_the_prompt(family: Family) -> None:
    assert family.turn.count("{prompt}") == 1
    assert family.turn.count(family.image_placeholder) == 1
    before, _, after = family.turn.partition("{prompt}")
    assert family.image_placeholder in before
    assert any(marker in before for marker in family.role_markers)
    assert any(marker in after for marker in family.role_markers)
    # Whatever looks like a token in the turn is known as one.
    known = {*family.special_tokens, family.image_placeholder}
    assert set(re.findall(r"<[^<>]+>", family.turn)) <= known
    assert len(set(family.special_tokens)) == len(family.special_tokens)


@ALL
def test_image_prompt_and_answer_fit_into_the_context(family: Family) -> None:
    answer = EndpointConfig.model_fields["max_tokens"].default
    left = family.serve.max_model_len - family.max_image_tokens - answer
    # A token holds three characters and more of English.
    assert left > len(render("engine-v1", Hints())) / 3 + 500
    assert family.serve.limit_mm_per_prompt["image"] == 1
    assert family.serve.mm_processor_cache_gb == 0


@pytest.mark.parametrize(("name", "unit"), [("qwen2-vl", 28), ("qwen2.5-vl", 28), ("qwen3-vl", 32)])
def test_a_two_to_one_picture_fills_the_tokens_of_a_dynamic_family(name: str, unit: int) -> None:
    (family,) = [family for family in families() if family.name == name]
    kwargs = family.serve.mm_processor_kwargs
    pixels = kwargs["max_pixels"] if "max_pixels" in kwargs else kwargs["size"]["longest_edge"]
    assert pixels == family.max_image_tokens * unit**2
    columns, rows = family.image_max_edge // unit, family.image_max_edge // 2 // unit
    assert columns * rows <= family.max_image_tokens < (columns + 1) * (rows + 1)


def test_an_unknown_or_missing_field_is_an_error() -> None:
    path = module.FAMILIES / "llava-1.5.yaml"
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert Family(name="x", **fields)
    with pytest.raises(ValidationError, match=r"image_max_egde\n.*Extra inputs"):
        Family(name="x", **fields, image_max_egde=336)
    with pytest.raises(ValidationError, match=r"serve\.max_len\n.*Extra inputs"):
        Family(name="x", **{**fields, "serve": {**fields["serve"], "max_len": 1}})
    del fields["special_tokens"]
    with pytest.raises(ValidationError, match=r"special_tokens\n.*Field required"):
        Family(name="x", **fields)
