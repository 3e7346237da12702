"""Real photos that lie inside installed packages: scikit-image's and matplotlib's sample data.

Only files whose source and licence scikit-image's own documentation states as CC0, public domain
or "no known copyright restrictions" (docstrings of `skimage.data`), and matplotlib's portrait of
Grace Hopper, an official photograph of the US Navy (public domain). Nothing is downloaded.
Text inside these photos is not annotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random

from PIL import Image

from .canvas import Picture

MIN_EDGE = 300  # a 90 % crop of a photo stays above the demo's size limit
MAX_EDGE = 1000


@dataclass(frozen=True)
class Photo:
    file: str
    objects: tuple[str, ...]
    captions: tuple[str, ...]
    licence: str
    mirror: bool = True  # a mirror image would still look right
    kind: str = "photo"


_FREE = "no known copyright restrictions"
PHOTOS = (
    Photo(
        "astronaut.png",
        ("person", "astronaut", "space suit", "helmet", "flag"),
        ("Official portrait of astronaut Eileen Collins", "Astronaut in an orange space suit"),
        "public domain (NASA)",
        mirror=False,
    ),
    Photo("brick.png", ("brick wall",), ("Brick wall, black and white", "Old brick wall"), "CC0"),
    Photo(
        "camera.png",
        ("person", "camera", "tripod", "coat"),
        ("Man with a camera on a tripod in a park", "Cameraman at work"),
        "CC0",
    ),
    Photo("cell.png", ("cell",), ("A cell floating in saline under a microscope",), "CC0"),
    Photo("chelsea.png", ("cat",), ("Chelsea the cat", "Close-up of a tabby cat"), "CC0"),
    Photo(
        "clock_motion.png", ("clock",), ("Motion blurred photo of a wall clock",), "public domain"
    ),
    Photo(
        "coffee.png",
        ("cup", "coffee", "saucer", "spoon", "table"),
        ("A cup of espresso on a wooden table", "Coffee cup with spoon and saucer"),
        "CC0",
    ),
    Photo(
        "coins.png",
        ("coin",),
        ("Greek coins from Pompeii", "Rows of old coins"),
        _FREE,
        mirror=False,
    ),
    Photo("grass.png", ("grass",), ("Dry grass texture", "Grass seen from above"), "CC0"),
    Photo("gravel.png", ("gravel",), ("Gravel texture", "Small stones on the ground"), "CC0"),
    Photo(
        "horse.png",
        ("horse",),
        ("Black silhouette of a horse", "Horse clip art"),
        "CC0",
        kind="illustration",
    ),
    Photo(
        "hubble_deep_field.jpg",
        ("galaxy", "star"),
        ("Hubble eXtreme Deep Field", "Thousands of galaxies seen by the Hubble telescope"),
        "public domain (NASA)",
    ),
    Photo("ihc.png", ("tissue",), ("Colonic glands, immunohistochemical staining",), _FREE),
    Photo(
        "retina.jpg",
        ("retina",),
        ("Fundus photograph of a normal left eye", "Human retina"),
        "CC0",
        mirror=False,
    ),
    Photo(
        "rocket.jpg",
        ("rocket", "tower"),
        ("Rocket on the launch pad at dusk, Cape Canaveral", "Rocket launch site at night"),
        "public domain",
    ),
    Photo(
        "grace_hopper.jpg",
        ("person", "uniform", "hat", "glasses", "tie", "flag"),
        ("Grace Hopper in navy uniform", "Portrait of Rear Admiral Grace Hopper"),
        "public domain (US Navy)",
        mirror=False,
    ),
)
SMALL_PHOTOS = (
    Photo("microaneurysms.png", ("retina",), ("Detail of a retina",), "CC0"),
    Photo("text.png", ("handwriting",), ("Handwritten formulas",), "public domain", mirror=False),
)


def _path(file: str) -> Path:
    if file == "grace_hopper.jpg":
        import matplotlib

        return Path(matplotlib.get_data_path()) / "sample_data" / file
    return Path(str(resources.files("skimage"))) / "data" / file


def _opened(photo: Photo) -> Image.Image:
    with Image.open(_path(photo.file)) as stored:
        if stored.mode == "RGBA":
            white = Image.new("RGBA", stored.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, stored).convert("RGB")
        return stored.convert("RGB")


def load(photo: Photo, rng: Random) -> Picture:
    """The photo, RGB, at most `MAX_EDGE` long, cut to a region that depends on `rng`.

    The region keeps 92 to 100 % of each side; its short edge stays at least `MIN_EDGE` where the
    file's own does. Raises FileNotFoundError where the package's file is missing.
    """
    image = _opened(photo)
    image.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    width, height = (
        min(side, max(MIN_EDGE, round(side * rng.uniform(0.92, 1.0)))) for side in image.size
    )
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    region = image.crop((left, top, left + width, top + height))
    return Picture(region, photo.kind, [], list(photo.objects), list(photo.captions))


def load_all(photos: tuple[Photo, ...], seed: str) -> Iterator[tuple[Photo, Picture]]:
    for photo in photos:
        yield photo, load(photo, Random(f"{seed}/photo/{photo.file}"))
