"""How often the small NSFW model cries wolf: on pictures that nobody would mind.

    python -m benchmarks.harmless_pictures

All pictures of the Debian packages that `make photos` fetches and of the wheel of scikit-image with
a short edge of 200 pixels: photos, diagrams, screenshots. How much it finds is not measured here.
"""

from collections.abc import Iterator
from pathlib import Path

import skimage
from rich.progress import track

from benchmarks.result import finish
from experts.base import Hardware
from experts.scoring.nsfwjs import NsfwJs
from fusion_pipeline.dataset.images import RGB, DecodeError, decode
from tests.photos import FOLDER

SHORT_EDGE = 200
SUFFIXES = (".jpg", ".jpeg", ".png")
WRONG = ("hentai", "porn")
THRESHOLD = 0.5


def pictures() -> Iterator[tuple[str, RGB]]:
    if not FOLDER.is_dir():
        raise SystemExit(f"{FOLDER} is not there: run `make photos`")
    places = [*FOLDER.rglob("*"), *(Path(skimage.__file__).parent / "data").iterdir()]
    paths = sorted(p for p in places if p.suffix.lower() in SUFFIXES and p.is_file())
    for path in track(paths):
        try:
            image = decode(path.read_bytes())
        except DecodeError:
            continue  # the packages hold a few files that are no pictures
        if min(image.shape[:2]) >= SHORT_EDGE:
            yield path.name, image


def main() -> None:
    expert = NsfwJs(NsfwJs.Config(), Hardware())
    seen, wrong = 0, dict[str, float]()
    for name, image in pictures():
        [found] = expert([image], [])
        score = sum(tag.score for tag in found if tag.label in WRONG)
        seen += 1
        if score > THRESHOLD:
            wrong[name] = round(score, 2)
    rows = [{"pictures": seen, "called porn or hentai": len(wrong), "share": len(wrong) / seen}]
    share = len(wrong) / seen
    finish("harmless-pictures", share, "share", 0.03, share <= 0.03, rows, {"wrong": wrong})


if __name__ == "__main__":
    main()
