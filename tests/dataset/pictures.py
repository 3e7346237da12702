"""Small pictures in every format, and comparing them."""

import io

import numpy as np
from PIL import Image

from fusion_pipeline.dataset.images import RGB


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def smooth(width: int = 48, height: int = 32) -> Image.Image:
    """Four coloured quarters: survives JPEG, and every orientation looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (220, 30, 40)
    pixels[: height // 2, width // 2 :] = (30, 200, 60)
    pixels[height // 2 :, : width // 2] = (40, 60, 210)
    pixels[height // 2 :, width // 2 :] = (240, 230, 90)
    return Image.fromarray(pixels)


def noise(width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def close(a: RGB, b: RGB, tolerance: float = 3.0) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).mean()) < tolerance


FRAMES = [noise().rotate(180), noise().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
ENCODED = {
    "jpeg": save(noise(), "JPEG"),
    "jpeg progressive": save(noise(), "JPEG", progressive=True),
    "png": save(noise(), "PNG"),
    "png palette": save(noise().quantize(16), "PNG", transparency=3),
    "apng": save(noise(), "PNG", save_all=True, append_images=FRAMES),
    "webp": save(noise(), "WEBP"),
    "webp animated": save(noise(), "WEBP", save_all=True, append_images=FRAMES),
    "gif": save(noise(), "GIF"),
    "gif animated": save(noise(), "GIF", save_all=True, append_images=FRAMES),
    "bmp": save(noise(), "BMP"),
    "tiff": save(noise(), "TIFF"),
}
