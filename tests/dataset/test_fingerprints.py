"""Fingerprints: equal for equal content, different for anything else, readable differences."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.dataset.fingerprints import (
    Fingerprint,
    canonical_json,
    differences,
    fingerprint,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip
FIELDS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), JSON)
BASE = Fingerprint({"base": 1})


def shuffled(value: object) -> object:
    """Equal, its mappings filled in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_one_spelling_for_equal_values(value: object) -> None:
    assert canonical_json(value) == canonical_json(shuffled(value))


def test_numbers_that_have_no_json_are_refused() -> None:
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"threshold": number})


@pytest.mark.parametrize(
    "other",
    [
        fingerprint("step-2", 1, {"a": 1}, {"samples": BASE}, "r1"),
        fingerprint("step", 2, {"a": 1}, {"samples": BASE}, "r1"),
        fingerprint("step", 1, {"a": 1.5}, {"samples": BASE}, "r1"),
        fingerprint("step", 1, {"a": "1"}, {"samples": BASE}, "r1"),
        fingerprint("step", 1, {"a": 1, "b": None}, {"samples": BASE}, "r1"),
        fingerprint("step", 1, {"a": 1}, {"samples": Fingerprint({"base": 2})}, "r1"),
        fingerprint("step", 1, {"a": 1}, {"samples": BASE, "more": BASE}, "r1"),
        fingerprint("step", 1, {"a": 1}, {"samples": BASE}, "r2"),
        fingerprint("step", 1, {"a": 1}, {"samples": BASE}),
    ],
)
def test_whatever_changes_the_output_changes_the_hash(other: Fingerprint) -> None:
    base = fingerprint("step", 1, {"a": 1}, {"samples": BASE}, "r1")
    assert other.hash != base.hash
    assert differences(base.fields, other.fields)


def test_a_change_travels_downstream() -> None:
    def last_of_chain(setting: int) -> str:
        made = BASE
        for step in range(3):
            config = {"setting": setting} if step == 0 else {}
            made = fingerprint(f"step-{step}", 1, config, {"before": made})
        return made.hash

    assert last_of_chain(1) == last_of_chain(1)
    assert last_of_chain(1) != last_of_chain(2)


def test_the_hash_is_the_same_in_every_process() -> None:
    code = (
        "from fusion_pipeline.dataset.fingerprints import fingerprint as f;"
        "print(f('s', 1, {k: i for i, k in enumerate(set('abcdefgh') and sorted('abcdefgh'))},"
        " {'u': f('t', 1, {}, {})}, 'ü').hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == 32


@settings(max_examples=60)
@given(FIELDS, FIELDS)
def test_there_are_differences_whenever_hashes_differ(
    old: dict[str, object], new: dict[str, object]
) -> None:
    assert (differences(old, new) == []) == (Fingerprint(old).hash == Fingerprint(new).hash)
    assert differences(old, dict(old)) == []


def test_differences_are_for_people() -> None:
    old = {"version": 1, "config": {"min_short_edge": 448, "same": [1]}, "upstream": {"a": "x"}}
    new = {"version": 2, "config": {"min_short_edge": 256, "same": [1], "new": True}}
    assert differences(old, new) == [
        "config.min_short_edge: 448 -> 256",
        "config.new: absent -> True",
        "upstream: {'a': 'x'} -> absent",
        "version: 1 -> 2",
    ]
