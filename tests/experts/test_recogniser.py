"""The recogniser reads what RapidOCR's own does, and shows what it saw."""

from random import Random

import numpy as np
import pytest
import rapidocr
from rapidocr.ch_ppocr_rec import TextRecInput, TextRecognizer

from experts.ocr.rapidocr import WEIGHTS
from experts.ocr.recogniser import Recogniser, _further_output
from fusion_pipeline.dataset.images import RGB
from tests.experts.pages import page


@pytest.fixture(scope="module")
def crops() -> list[RGB]:
    """Lines of two scripts, some cut short so that they are narrower than the network's input."""
    found = []
    for script in ("Latn", "Hani"):
        drawn = page(Random(script), script, 0)
        for line in drawn.lines:
            (x1, y1), (x2, y2) = line.quad[[0, 2]].round().astype(int).tolist()
            found.append(drawn.image[y1 - 4 : y2 + 4, x1 - 4 : x2 + 4, ::-1].copy())
    return [*found, *(crop[:, : crop.shape[0] * 2] for crop in found)]


def test_it_reads_what_rapidocr_reads(crops: list[RGB]) -> None:
    own = Recogniser(WEIGHTS["Rec"], threads=1)
    settings = rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            "Rec.rec_batch_num": 1,
            "Rec.rec_img_shape": [3, 48, 160],
            "Rec.font_path": None,
            **{f"{part}.model_path": str(path) for part, path in WEIGHTS.items()},
        }
    ).cfg
    settings.Rec.engine_cfg = settings.EngineConfig.onnxruntime
    theirs = TextRecognizer(settings.Rec)(TextRecInput(img=crops))
    read = [own(crop) for crop in crops]
    assert [line.text for line in read] == list(theirs.txts)
    assert [line.score for line in read] == pytest.approx(theirs.scores, abs=1e-3)
    assert sum(len(line.text) for line in read) > 100


def test_what_it_saw_covers_the_line_and_no_more(crops: list[RGB]) -> None:
    own = Recogniser(WEIGHTS["Rec"], threads=1)
    for crop in crops:
        seen = own(crop)
        steps = len(seen.best)
        assert steps == pytest.approx(48 * crop.shape[1] / crop.shape[0] / 8, abs=1.5)
        assert seen.activations.shape == (steps, 120)
        assert seen.sureness.shape == seen.blank.shape == (steps,)
        assert (seen.best == 0).tolist() == (seen.blank == seen.sureness).tolist()
        assert np.isfinite(seen.activations).all()


def test_a_name_that_is_too_long_for_the_short_form_is_refused() -> None:
    with pytest.raises(ValueError, match="longer length"):
        _further_output("x" * 125)
