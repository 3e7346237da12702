"""The image as an endpoint gets it."""

import io

from PIL import Image

from fusion_pipeline.dataset.images import decode, inspect
from fusion_pipeline.fuse.base import CaptionRequest

_JPEG_QUALITY = 90
_SENDABLE_FORMATS = {"jpeg", "png", "webp"}
# Pixel types that every decoder reads alike. Transparency, palettes, CMYK and 16 bits are
# flattened by our own decoder, so that the engine sees the pixels the experts saw.
_SENDABLE_MODES = {"RGB", "L"}


def image_to_send(request: CaptionRequest, max_edge: int) -> tuple[str, bytes]:
    """Media type and bytes, the long edge at most `max_edge` pixels: the original where the
    endpoint can be trusted to read it as we do. Raises DecodeError."""
    short, long = sorted((request.width, request.height))
    if long <= max_edge:
        info = request.info or inspect(request.image)
        if (
            info.format in _SENDABLE_FORMATS
            and info.mode in _SENDABLE_MODES
            and info.orientation == 1
            and not info.animated
            and max(info.width, info.height) <= max_edge
        ):
            return f"image/{info.format}", request.image
        pixels = decode(request.image)
    else:
        # Rounded up, so that the decoder's cheap scaling never goes below what is sent.
        pixels = decode(request.image, min_short_edge=-(-short * max_edge // long))
    image = Image.fromarray(pixels)
    image.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return "image/jpeg", out.getvalue()
