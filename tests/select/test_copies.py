"""Near-exact copies are confirmed; pictures that merely look the same are not."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from fusion_pipeline.select.copies import CopyRule, is_near_exact

DATA = Path(skimage.__file__).parent / "data"
FONT = font_manager.findfont("DejaVu Sans", fallback_to_default=False)


def photo(name: str) -> np.ndarray:
    return np.asarray(Image.open(DATA / name).convert("RGB"))


def slide(words: str = "solar budget harbour", page: int = 4, dark: bool = False) -> np.ndarray:
    """A flat template slide, 960x540, body text of 14 px."""
    image = Image.new("RGB", (960, 540), (30, 34, 48) if dark else (245, 243, 236))
    draw, ink = ImageDraw.Draw(image), (230, 230, 230) if dark else (20, 20, 20)
    draw.rectangle((0, 0, 960, 70), fill=(60, 90, 160))
    draw.text((30, 18), "Quarterly review", font=ImageFont.truetype(FONT, 28), fill="white")
    for line in range(6):
        text = f"{line + 1}. the {words if line == 3 else 'north river market'} of year {line + 3}"
        draw.text((60, 110 + 60 * line), text, font=ImageFont.truetype(FONT, 14), fill=ink)
    draw.text((900, 510), f"{page}", font=ImageFont.truetype(FONT, 14), fill=ink)
    return np.asarray(image)


def chart(heights: tuple[int, ...]) -> np.ndarray:
    image = Image.new("RGB", (800, 600), "white")
    draw = ImageDraw.Draw(image)
    draw.line((60, 60, 60, 520, 760, 520), fill="black", width=2)
    for bar, height in enumerate(heights):
        draw.rectangle((90 + 110 * bar, 520 - height, 160 + 110 * bar, 520), fill=(40, 120, 160))
    return np.asarray(image)


def gradient() -> np.ndarray:
    corners = np.array([[[20, 60, 200], [220, 90, 40]], [[90, 200, 90], [10, 10, 30]]], np.float32)
    return cv2.resize(corners, (800, 500)).astype(np.uint8)


def coded(image: np.ndarray, kind: str, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def crop(image: np.ndarray, share: float, across: float, down: float) -> np.ndarray:
    height, width = image.shape[:2]
    rows, columns = round(height * share), round(width * share)
    top, left = round((height - rows) * down), round((width - columns) * across)
    return image[top : top + rows, left : left + columns]


def half(image: np.ndarray) -> np.ndarray:
    size = (image.shape[1] // 2, image.shape[0] // 2)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


COPIES = {
    "png": lambda image: image.copy(),
    "webp": lambda image: coded(image, "WEBP", 80),
    "jpeg_q30": lambda image: coded(image, "JPEG", 30),
    "half": half,
    "mirror": lambda image: image[:, ::-1],
    "crop90_corner": lambda image: crop(image, 0.9, 0, 0),
    "crop90_other_corner": lambda image: crop(image, 0.9, 1, 1),
    "crop90_middle": lambda image: crop(image, 0.9, 0.5, 0.5),
    "crop90_half": lambda image: half(crop(image, 0.9, 0.8, 0.1)),
    "mirrored_crop90_q50": lambda image: coded(crop(image, 0.9, 0.3, 1)[:, ::-1], "JPEG", 50),
}
ORIGINALS = {
    "coffee": lambda: photo("coffee.png"),
    "grass": lambda: photo("grass.png"),
    "moon": lambda: photo("moon.png"),
    "gradient": gradient,
    "slide": slide,
    "dark slide": lambda: slide(dark=True),
    "chart": lambda: chart((100, 260, 180, 310, 220)),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("name", ORIGINALS)
def test_copies_are_confirmed(name: str, kind: str) -> None:
    original = ORIGINALS[name]()
    copy = COPIES[kind](original)
    verdict = is_near_exact(original, copy)
    assert verdict.confirmed, verdict
    assert verdict.mirrored == ("mirror" in kind)
    assert verdict.overlap == pytest.approx(0.81 if "crop" in kind else 1.0, abs=0.02)
    assert verdict == is_near_exact(copy, original)


DISTINCT = {
    "one word of a slide": lambda: (slide(), slide("solar budget bridges")),
    "page number of a slide": lambda: (slide(), slide(page=7)),
    "one word of a dark slide": lambda: (
        slide(dark=True),
        slide("solar garden harbour", dark=True),
    ),
    "one bar of a chart": lambda: (chart((100, 260, 180, 310)), chart((100, 260, 210, 310))),
    "stereo pair": lambda: (photo("motorcycle_left.png"), photo("motorcycle_right.png")),
    "crops of one texture": lambda: (
        crop(photo("grass.png"), 0.6, 0, 0),
        crop(photo("grass.png"), 0.6, 1, 1),
    ),
    "70 % crop": lambda: (photo("coffee.png"), crop(photo("coffee.png"), 0.7, 0.5, 0.5)),
    "another colour": lambda: (gradient(), gradient()[:, :, ::-1]),
    "unrelated": lambda: (photo("coffee.png"), photo("chelsea.png")),
}


# A crop that cuts the page number away makes the two slides copies.
CHANGED = [
    (name, change)
    for name in DISTINCT
    for change in ("png", "jpeg_q30", "half", "mirror", "crop90_middle")
    if (name, change) != ("page number of a slide", "crop90_middle")
]


@pytest.mark.parametrize(("name", "change"), CHANGED)
def test_look_alikes_are_not_confirmed(name: str, change: str) -> None:
    image, other = DISTINCT[name]()
    verdict = is_near_exact(image, COPIES[change](other))
    assert not verdict.confirmed, verdict
    assert verdict.reason in {"other_content", "no_alignment"}


def test_tiny_and_extreme_frames_have_a_verdict() -> None:
    dot, strip = np.zeros((1, 1, 3), np.uint8), np.full((3, 4000, 3), 255, np.uint8)
    assert is_near_exact(dot, dot.copy()).reason == "same_pixels"
    assert not is_near_exact(dot, strip).confirmed
    assert not is_near_exact(strip, photo("coffee.png")).confirmed
    assert not is_near_exact(strip, strip.transpose(1, 0, 2).copy()).confirmed


def test_images_must_be_rgb_bytes() -> None:
    with pytest.raises(ValueError, match="uint8"):
        is_near_exact(np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8))


def test_rule_sets_the_overlap() -> None:
    image = photo("coffee.png")
    copy = crop(image, 0.9, 0, 0)
    assert not is_near_exact(image, copy, CopyRule(min_overlap=0.9)).confirmed
