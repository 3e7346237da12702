"""`fusion doctor --smoke`: what works is shown, what does not is named and ends with status 1."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from experts.detection import nanodet
from fusion_pipeline.cli import main
from fusion_pipeline.smoke import KNOWN, SIGN, Card, Found, shown
from tests.fuse.openai_server import MODEL, Reply, completion, serve

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
CLOSED = "http://127.0.0.1:9/v1"


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str


Smoke = Callable[..., Shown]


@pytest.fixture
def smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Smoke:
    """`fusion doctor --smoke configs/quickstart.yaml`, with a source that is there."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> Shown:
        config = [str(QUICKSTART), f"source.webdataset={tmp_path}", f"run={tmp_path}-out"]
        monkeypatch.setattr(sys, "argv", ["fusion", "doctor", "--smoke", *config, *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Shown(code, *capsys.readouterr())

    return call


def engine(url: str, model: str = "m", key_env: str = "null") -> str:
    return f'caption.engine={{endpoint: {{url: "{url}", model: {model}, key_env: {key_env}}}}}'


def test_the_shipped_models_know_the_photos(smoke: Smoke, tmp_path: Path) -> None:
    result = smoke("--json")
    assert result.code == 0
    printed = json.loads(result.out)
    assert set(printed) == {"checks", "smoke"}
    assert {"name", "state", "found", "fix"} == set(printed["checks"][0])
    cards = {card["photo"]: card for card in printed["smoke"]}
    assert list(cards) == sorted(KNOWN)
    assert not [card["problems"] for card in cards.values() if card["problems"]]

    cat, sign = cards["cat.png"], cards["sign.png"]
    assert [(fact["stage"], fact["expected"], fact["seen"]) for fact in cat["facts"]] == [
        ("tags/efficientnet-lite2", "cat", True),
        ("objects/nanodet", "cat", True),
    ]
    assert [line["label"] for line in sign["evidence"]["text/rapidocr"]] == list(SIGN)
    assert all(fact["seen"] for card in cards.values() for fact in card["facts"])
    for words, card in (("cat", cat), ("espresso", cards["coffee.png"]), (SIGN[0], sign)):
        assert words in card["prompt"]
        assert words in card["caption"]
    stages = ["alt_texts", "tags/efficientnet-lite2", "tags/merged", "objects/nanodet"]
    stages += ["objects/merged", "text/rapidocr", "hints", "prompts/engine-v1", "captions/composer"]
    assert [list(card["seconds"]) for card in cards.values()] == [stages] * len(KNOWN)
    assert all(0 <= s < 60 for card in cards.values() for s in card["seconds"].values())
    assert not Path(f"{tmp_path}-out").exists()  # the run itself is not touched


def test_cards_fit_a_terminal_and_a_fact_not_seen_is_a_warning(smoke: Smoke) -> None:
    result = smoke("experts=[nanodet]", "hints.object_threshold=0.55")
    assert result.code == 0
    cards = result.out[result.out.index("╭") :].splitlines()
    assert {len(line) for line in cards[:-1]} == {80}
    assert "│ not seen  cat in objects/nanodet" in result.out  # found, but it reaches no prompt
    assert "│ ok        person in objects/nanodet" in result.out
    assert SIGN[0] not in result.out  # no expert that reads, no fact about text
    assert cards[-1] == "4 of 4 photos captioned, 2 of 3 known facts seen"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (engine(CLOSED), f"connection (m at {CLOSED})"),
        (engine(CLOSED, key_env="NO_SUCH_KEY"), "no API key: set the environment variable NO_SU"),
    ],
)
def test_an_engine_that_does_not_answer_is_one_line(
    settings: str, reason: str, smoke: Smoke
) -> None:
    result = smoke("experts=[nanodet]", settings)
    assert result.code == 1
    (line,) = [line for line in result.out.splitlines() if line.startswith("failed")]
    assert line.startswith(f"failed   captions/m: {reason}")
    assert line.endswith("; 4 of 4 photos")
    assert "│ ok        cat in objects/nanodet" in result.out  # what came before is shown
    assert "0 of 4 photos captioned, 3 of 3 known facts seen" in result.out
    assert "Traceback" not in result.out + result.err


def test_broken_weights_are_named_and_the_other_experts_still_tried(
    smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "nanodet.onnx"
    half.write_bytes(nanodet.WEIGHTS.read_bytes()[: nanodet.WEIGHTS.stat().st_size // 2])
    monkeypatch.setattr(nanodet, "WEIGHTS", half)
    result = smoke("--json", "experts=[nanodet, efficientnet-lite2]")
    assert result.code == 1
    for card in json.loads(result.out)["smoke"]:
        (problem,) = card["problems"]
        assert problem["stage"] == "objects/nanodet"
        assert problem["reason"].startswith("could not be opened: InvalidProtobuf")
        assert card["seconds"]["tags/efficientnet-lite2"] is not None
        assert card["seconds"]["hints"] is None
        assert card["caption"] is None


def test_a_photo_that_an_expert_fails_on_stops_there_alone(
    smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    well = nanodet.NanoDet.__call__

    def sick(self, images, context):  # type: ignore[no-untyped-def]
        if any(image.shape[:2] == (360, 640) for image in images):
            raise ValueError("sick")
        return well(self, images, context)

    monkeypatch.setattr(nanodet.NanoDet, "__call__", sick)
    result = smoke("experts=[nanodet]")
    assert result.code == 1
    assert "failed   objects/nanodet: ValueError: sick; 1 of 4 photos\n" in result.out
    assert result.out.count("failed") == 1
    assert result.out.count("-  not reached") == 4  # merged, hints, prompt and caption of the sign
    assert "3 of 4 photos captioned, 3 of 3 known facts seen" in result.out


def test_words_of_a_model_are_text_on_the_card(smoke: Smoke) -> None:
    hostile = "[red]A cat[/red] \x1b]0;owned\x07on a mat"
    with serve(None) as server:
        server.always = Reply(body=completion(hostile, finish="length"))
        result = smoke("experts=[nanodet]", engine(server.url, MODEL))
    assert result.code == 0
    assert "[red]A cat[/red] �]0;owned�on a mat (cut off" in result.out
    assert "\x1b" not in result.out
    assert len(server.requests) == len(KNOWN)


def test_a_label_does_not_break_its_card() -> None:
    found = [Found("big\ncat", 0.9, True), Found("[/]", 0.2, False)]
    card = Card("x.png", 4, 3, {"tags/x": 0.1}, {"tags/x": found})
    panel, total = shown([card])
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(panel)
    assert "0.10 s  big cat 0.90 (below the threshold: [/] 0.20)" in console.export_text()
    assert str(total) == "0 of 1 photos captioned, 0 of 0 known facts seen"


def test_what_is_needed_is_said(
    smoke: Smoke, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    result = smoke()
    assert result.code == 1
    assert "error: the smoke photos need skimage: pip install 'fusion-pipeline[demo]'" in result.err
    monkeypatch.setattr(sys, "argv", ["fusion", "doctor", "--smoke"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "error: --smoke needs a config: fusion doctor CONFIG --smoke" in capsys.readouterr().err
