"""How much of what the composer says is true, on demo data whose contents are known.

    python -m benchmarks.composer_truth [--report 29 30 31] [--work FOLDER]

The quick start's job over fresh demo data, up to the captions. Each caption is taken apart into its
statements (sentences), and these into claims: an object, its number, its place, a text, where it
stands, format, colours. A claim is held against the truth file; what that does not tell stays
undecided. With `--work` demo data and runs stay in a folder and are taken from there the next time.

What the truth file decides: all rendered texts with their places; the size; the kinds of things in
drawn pictures, in which nothing else is drawn that an expert has a name for. Of photos it lists
some of what is to be seen, so a name that it lacks is undecided there, and so is text in photos.
Numbers and places of objects, and colours, are in no truth file.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rapidfuzz.distance import Levenshtein
from rapidfuzz.fuzz import partial_ratio_alignment
from rich.console import Console

from benchmarks.result import finish
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.evidence import Box, DetectedObject, Tag, TextLine
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.demo.evaluate import Row, Truth
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from fusion_pipeline.fuse.base import CaptionRequest
from fusion_pipeline.fuse.composer import Composer, Measured, Statement
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.pipeline import ChainPhase, Pipeline, build_pipeline
from fusion_pipeline.runner import Options, Runner

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MISREAD = 0.05
"""Character error above which a text counts as misread."""
KINDS = ("object", "count", "place", "format", "colour", "text", "text place")


# --- evidence ------------------------------------------------------------------------------------

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBER = {word: n for n, word in enumerate(_NUMBERS, 1)}


def lacks_evidence(statement: Statement, request: CaptionRequest) -> str | None:
    """What of a statement no evidence of its request holds; None when there is nothing."""
    if not statement.evidence:
        return "no evidence at all"
    quads = {line.quad for line in request.text}
    for item in statement.evidence:
        match item:
            case str():
                known = item in request.alt_texts
            case TextLine():
                known = item.quad in quads and item.text in statement.text
            case Tag():
                known = item in request.tags
            case DetectedObject():
                known = item in request.objects
            case Measured():
                known = 0 < item.share <= 1
        if not known:
            return f"not the request's: {item!r}"
    if _is_text(statement):
        return None
    boxes = sum(isinstance(item, DetectedObject) for item in statement.evidence)
    if _total(re.sub(r"\(.*?\)", "", statement.text)) > boxes:
        return "more things than boxes"
    return None


def _is_text(statement: Statement) -> bool:
    return any(isinstance(item, TextLine) for item in statement.evidence)


def _total(text: str) -> int:
    """Sum of the numbers that a text says."""
    return sum(_number(word) for word in re.findall(r"\w+", text))


def _number(word: str) -> int:
    return int(word) if word.isdigit() else _NUMBER.get(word.lower(), 0)


# --- claims --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    kind: str
    """One of KINDS."""
    said: str
    is_true: bool | None
    """None: the truth file does not tell."""
    why: str = ""


def claims_of(statement: Statement, truth: Row) -> list[Claim]:
    """`truth`: the row of the sample in the demo's truth file."""
    if _is_text(statement):
        return list(_text_claims(statement, truth))
    if any(isinstance(i, Measured) and i.what == "size" for i in statement.evidence):
        return [_format_claim(statement, truth), Claim("colour", statement.text, None)]
    return list(_thing_claims(statement, truth))


def _format_claim(statement: Statement, truth: Row) -> Claim:
    width, height = truth["upright_size"]
    said = re.search(r"portrait-format|square|landscape-format", statement.text)
    shape = said[0] if said else "none"
    right = {
        "portrait-format": width <= height,
        "landscape-format": width >= height,
        "square": abs(width / height - 1) <= 0.06,
    }
    return Claim("format", shape, right.get(shape, False), f"{width} x {height}")


# Things

_PLACE = (
    r"in the (?:upper|lower) (?:left|right)|on the (?:left|right)|at the (?:top|bottom)"
    r"|in the middle|filling most of the frame"
)
_PHRASE = re.compile(
    rf"(?:(?P<count>{'|'.join(_NUMBERS)}|\d+|an?) )?(?P<name>.+?)(?P<place> (?:{_PLACE})| \(.*\))?"
)
_SINGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child",
             "mice": "mouse", "knives": "knife"}  # fmt: skip
_SAME = {"espresso": "coffee"}
"""A name of the experts, as the truth file calls the same thing."""


def _thing_claims(statement: Statement, truth: Row) -> Iterator[Claim]:
    listed = re.sub(r"^(?:There|Also in view) (?:is|are) |\.$", "", statement.text)
    for phrase in re.split(r"(?:, | and )(?![^(]*\))", listed):
        found = _PHRASE.fullmatch(phrase)
        assert found is not None, phrase
        count = 1 if found["count"] in ("a", "an", None) else _number(found["count"])
        name = _singular(found["name"]) if count > 1 else found["name"]
        there = _is_there(name, truth)
        yield Claim("object", name, there, f"{truth['content']}: {', '.join(truth['objects'])}")
        if there is not False:  # of what is not there, number and place are no further faults
            if count > 1:
                yield Claim("count", phrase, None)
            if found["place"]:
                yield Claim("place", phrase, None)


def _singular(name: str) -> str:
    start, space, last = name.rpartition(" ")
    if last in _SINGULAR:
        return f"{start}{space}{_SINGULAR[last]}"
    return re.sub(r"(?<=[sx])es$|(?<=[cs]h)es$|s$", "", name)


def _is_there(name: str, truth: Row) -> bool | None:
    if {name, _SAME.get(name)} & set(truth["objects"]):
        return True
    return None if _is_photo(truth) else False


def _is_photo(truth: Row) -> bool:
    return bool(truth["content"].startswith("photo/"))


# Texts


def _text_claims(statement: Statement, truth: Row) -> Iterator[Claim]:
    place = statement.text.partition(", text reads ")[0].lower()
    for item in statement.evidence:
        if isinstance(item, TextLine):
            lines = _lines_at(item.box, truth)
            yield _text_claim(item.text, lines, truth)
            if lines:
                box = _around([line["share"] for line in lines])
                yield Claim("text place", f"{place}: {item.text}", _is_at(place, box), str(box))
            else:
                yield Claim("text place", f"{place}: {item.text}", None)


def _lines_at(box: Box, truth: Row) -> list[Row]:
    """The truth's lines where a recognised one lies, from left to right, with box in shares."""
    width, height = truth["upright_size"]
    found = []
    for kind in ("texts", "cut_texts"):
        for line in truth[kind]:
            x1, y1, x2, y2 = line["box"]
            own = (x1 / width, y1 / height, x2 / width, y2 / height)
            shared_width = min(box[2], own[2]) - max(box[0], own[0])
            shared_height = min(box[3], own[3]) - max(box[1], own[1])
            if shared_height > 0.5 * min(box[3] - box[1], own[3] - own[1]) and (
                shared_width > 0.2 * min(box[2] - box[0], own[2] - own[0])
            ):
                found.append({**line, "share": own, "cut": kind == "cut_texts"})
    return sorted(found, key=lambda line: line["share"][0])


def _text_claim(text: str, lines: Sequence[Row], truth: Row) -> Claim:
    if not lines:
        return Claim("text", text, None if _is_photo(truth) else False, "no text stands there")
    stands = "".join("".join(line["text"].split()) for line in lines)
    error = _error("".join(text.split()), stands)
    if error <= MISREAD:
        part = len("".join(text.split())) < (1 - MISREAD) * len(stands)
        return Claim("text", text, True, f"part of {stands!r}" if part else "")
    # Of a line that a crop cut through nobody can say what its rest reads.
    is_cut = any(line["cut"] for line in lines)
    return Claim("text", text, None if is_cut else False, f"{stands!r} stands there")


def _error(said: str, stands: str) -> float:
    """Character error against the like part of what stands there: a part is no untruth."""
    part = partial_ratio_alignment(said, stands) if len(said) < len(stands) else None
    like = stands[part.dest_start : part.dest_end] if part else stands
    return float(Levenshtein.normalized_distance(said, like))


def _around(boxes: Sequence[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _is_at(place: str, box: Box) -> bool:
    """By halves of the frame, as a reader understands the words, not by the composer's bounds."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    wide, tall = box[2] - box[0] > 0.5, box[3] - box[1] > 0.5
    tests = {
        "left": x < 0.5,
        "right": x > 0.5,
        "upper": y < 0.5,
        "top": y < 0.5,
        "lower": y > 0.5,
        "bottom": y > 0.5,
        "middle": (wide or 0.25 < x < 0.75) and (tall or 0.25 < y < 0.75),
        "frame": wide and tall,
    }
    return all(tests[word] for word in re.findall(r"\w+", place) if word in tests)


# --- the runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One statement, held against the truth."""

    seed: int
    sample: str
    """Name in the truth file."""
    statement: Statement
    lacks: str | None
    claims: Sequence[Claim]

    @property
    def is_true(self) -> bool | None:
        """False with one false claim, None with an undecided one."""
        verdicts = {claim.is_true for claim in self.claims}
        return False if False in verdicts else None if None in verdicts else True


def caption_seed(folder: Path, seed: int) -> tuple[Pipeline, Truth]:
    """Make and caption one seed's demo data; what is there is not made again."""
    demo = folder / f"demo-{seed}"
    if not (demo / "truth.json").exists():  # written last
        make_demo_data(demo, seed)
    overrides = [f"run={folder}/truth-{seed}", f"source.webdataset={demo}/shards"]
    pipeline = build_pipeline(load_config(CONFIG, overrides))
    until = Options(until="captions/composer", in_process=True)
    Runner(pipeline, until, Console(quiet=True)).run()
    return pipeline, Truth.read(demo / "truth.json")


def requests_of(pipeline: Pipeline) -> Iterator[tuple[CaptionRequest, str]]:
    """What the composer was asked and what it answered, for every captioned sample."""
    chains = (phase for phase in pipeline.phases if isinstance(phase, ChainPhase))
    works = (step.work for phase in chains for step in phase.steps)
    stage = next(work for work in works if isinstance(work, Caption))
    selected = pipeline.selected
    for shard, captions in selected.iterate(stage.name):
        done = pc.equal(captions["status"], "ok")
        tables = {
            name: selected.read_table(name, shard)[0].filter(done)
            for name in ("samples", *stage.reads)
        }
        block = ShardBlock(selected, shard, tables, ShardImages(selected, shard))
        said = captions.filter(done)["caption"].to_pylist()
        yield from zip(stage.requests(block), said, strict=True)


def statements_of(pipeline: Pipeline, truth: Truth, seed: int) -> Iterator[Said]:
    rows, composer = truth.by_sample(pipeline.pool), Composer()
    for request, caption in requests_of(pipeline):
        statements = composer.statements(request)
        assert " ".join(statement.text for statement in statements) == caption
        row = rows[request.key]
        for statement in statements:
            lacks = lacks_evidence(statement, request)
            yield Said(seed, row["name"], statement, lacks, claims_of(statement, row))


def _counts(verdicts: Sequence[bool | None]) -> Row:
    counts = Counter(verdicts)
    return {"true": counts[True], "false": counts[False], "undecided": counts[None]}


def by_kind(said: Sequence[Said]) -> list[Row]:
    claims = [claim for one in said for claim in one.claims]
    rows = []
    for kind in (*KINDS, "all"):
        of = [claim.is_true for claim in claims if kind in (claim.kind, "all")]
        rows.append({"claims about": kind, "claims": len(of), **_counts(of)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", type=int, nargs="+", default=[29, 30, 31])
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    said: list[Said] = []
    captions = 0
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.report:
            pipeline, truth = caption_seed(options.work or Path(temporary), seed)
            said += statements_of(pipeline, truth, seed)
            captions += sum(1 for _ in requests_of(pipeline))
    lacking = [one for one in said if one.lacks]
    details: dict[str, Any] = {
        "seeds": options.report,
        "captions": captions,
        "statements": {"all": len(said), **_counts([one.is_true for one in said])},
        "statements_by_seed": {
            seed: _counts([one.is_true for one in said if one.seed == seed])
            for seed in options.report
        },
        "without_evidence": [f"{one.statement.text} ({one.lacks})" for one in lacking],
        "false": _listed(said, False),
        "undecided_objects": _listed(said, None),
    }
    n = len(lacking)
    finish("composer-truth", n, "statements without evidence", 0, n == 0, by_kind(said), details)


def _listed(said: Sequence[Said], verdict: bool | None) -> list[str]:
    """Claims of this verdict, those that differ once; of undecided ones those about objects."""
    kinds = KINDS if verdict is False else ("object",)
    found = Counter(
        f"{claim.kind}: {claim.said!r} ({claim.why})"
        for one in said
        for claim in one.claims
        if claim.is_true is verdict and claim.kind in kinds
    )
    return [f"{n} x {text}" for text, n in sorted(found.items())]


if __name__ == "__main__":
    main()
