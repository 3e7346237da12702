"""Near-exact copies: an aligned pixel check of a pair that embeddings propose.

Embeddings can't make this decision: distinct slides of one template are closer to each other
(cosine 0.98) than an image is to its own crop (0.88). So the two images are laid over one another
(whole frame, mirrored frame, then crops) and the *worst* small tile decides: re-encoding spreads
its error over the picture, while another word or another bar sits in one place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb: TypeAlias = NDArray[np.uint8]
Gray: TypeAlias = NDArray[np.uint8]
Plane: TypeAlias = NDArray[np.float32]
# Affine map float64[2, 3] from the outer frame to the inner one, both measured from 0 to 1.
Pose: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class CopyRule:
    """Limits of the near-exact check. Residuals are relative: 0 equal, about 2 unrelated.

    min_overlap: the shared area as a part of either frame, at least this (a 90 % crop has 0.81).
    max_aspect: largest relative difference of aspect ratio at which whole frames are compared.
    max_fine: largest residual of a 12-px tile at working size, fine detail (text).
    max_outlier: the fine residual may also be at most this many times the 90th percentile of the
        textured tiles: in a clean copy one bad tile is another word, not noise.
    max_coarse: as max_fine, for large faint differences.
    max_pixels: working size, in pixels; 320k (754x424) keeps a changed word of 14-px text visible.
    """

    min_overlap: float = 0.75
    max_aspect: float = 0.04
    max_fine: float = 0.35
    max_outlier: float = 4.4
    max_coarse: float = 0.35
    max_pixels: int = 320_000


@dataclass(frozen=True)
class CopyVerdict:
    """What the check found for the best of its alignments.

    overlap: 0..1, shared area as a part of the frame of which it covers less.
    score: residual of the worst tile, divided by its limit: confirmed means at most 1.
    reason: same_pixels, same_frame, crop; or no_alignment, other_content.
    """

    confirmed: bool
    mirrored: bool
    overlap: float
    score: float
    reason: str


# Noise floors in grey levels. They lie above what JPEG quality 30 leaves in flat areas, so that
# flat images are not judged by their noise.
_FINE_FLOOR = 16.0
_COARSE_FLOOR = 8.0
# Residual that rounding and resampling alone may leave in a copy's textured tiles.
_USUAL_FLOOR = 0.03
# Standard deviation in px: takes out what resampling filters disagree on.
_BLUR = 0.8
# Side of the cells over which energies are summed; a tile is 3x3 of them.
_CELL = 4
_MAX_CORNERS = 300
_MIN_CORNERS = 8
_MIN_TEMPLATE = 8
_MAX_SKEW = 0.02
_SEARCH_PIXELS = 96 * 96
# Residual of thumbnails, relative to variance plus floor, above which a place is not looked at.
_MAX_SEARCH_RESIDUAL = 0.6
_SEARCH_FLOOR = 64.0


def is_near_exact(a: Rgb, b: Rgb, rule: CopyRule | None = None) -> CopyVerdict:
    """Is one image a re-encoded, resized, mirrored or slightly cropped copy of the other?

    a, b: uint8[h, w, 3], RGB, EXIF-upright. The verdict is the same for (a, b) and (b, a).
    Turned, recoloured and watermarked copies are other content here.
    Raises ValueError for another dtype or shape.
    """
    rule = rule or CopyRule()
    for image in (a, b):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"images must be uint8[h, w, 3], got {image.dtype}{image.shape}")
    a, b = sorted((a, b), key=lambda image: (image.shape[0] * image.shape[1], image.shape))[::-1]
    if a.shape == b.shape:
        first, second = a.tobytes(), b.tobytes()
        if first == second:
            return CopyVerdict(True, False, 1.0, 0.0, "same_pixels")
        if first < second:
            a, b = b, a
    best = CopyVerdict(False, False, 0.0, np.inf, "no_alignment")
    for verdict in _verdicts(a, b, rule):
        if verdict.confirmed:
            return verdict
        best = min(best, verdict, key=lambda v: v.score)
    return best


def _verdicts(a: Rgb, b: Rgb, rule: CopyRule) -> Iterator[CopyVerdict]:
    """Verdicts of one alignment after the other, cheap ones first."""
    mirror = {False: b, True: np.ascontiguousarray(b[:, ::-1])}
    whole = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    aspects = a.shape[1] * b.shape[0] / (a.shape[0] * b.shape[1])
    if abs(np.log(aspects)) <= rule.max_aspect:
        for mirrored, image in mirror.items():
            if _thumbnail_residual(a, image) <= _MAX_SEARCH_RESIDUAL:
                yield _check(a, image, whole, mirrored, "same_frame", rule)
    found: list[tuple[float, int, Rgb, Rgb, bool, Pose]] = []
    for mirrored, image in mirror.items():
        for outer, inner in ((a, image), (image, a)):
            residual, pose = _search(outer, inner, rule)
            if residual <= _MAX_SEARCH_RESIDUAL:
                found.append((residual, len(found), outer, inner, mirrored, pose))
    if found:
        _, _, outer, inner, mirrored, pose = min(found, key=lambda f: f[:2])
        for candidate in _refine(outer, inner, pose, rule):
            yield _check(outer, inner, candidate, mirrored, "crop", rule)


def _thumbnail_residual(a: Rgb, b: Rgb) -> float:
    """The search's residual for whole frames: spares unrelated pairs the check at full size."""
    size = _fitted(a, _SEARCH_PIXELS)
    image, other = (_luma(_resized(view, size)).astype(np.float32) for view in (a, b))
    return float(np.square(image - other).mean() / (other.var() + _SEARCH_FLOOR))


def _search(outer: Rgb, inner: Rgb, rule: CopyRule) -> tuple[float, Pose]:
    """Best place of `inner` inside `outer` over scales and shifts, at thumbnail size.

    Dense template matching, not feature points: gradients, the moon and flat slides have none.
    Squared differences, not correlation: a crop of a gradient correlates with all of it.
    """
    image = _luma(_resized(outer, _fitted(outer, _SEARCH_PIXELS))).astype(np.float32)
    height, width = image.shape
    aspect = inner.shape[1] / inner.shape[0]
    largest = min(width, height * aspect)
    smallest = np.sqrt(rule.min_overlap * width * height * aspect)
    # Once to twice the template's size, so that the many resizes below are cheap.
    source = _luma(_resized(inner, _fitted(inner, 4 * _SEARCH_PIXELS))).astype(np.float32)
    best, pose = np.inf, np.zeros((2, 3))
    for columns in range(int(np.floor(largest)), int(np.ceil(smallest)) - 2, -1):
        rows = min(height, round(columns / aspect))
        if min(columns, rows) < _MIN_TEMPLATE:
            continue
        template = cv2.resize(source, (columns, rows), interpolation=cv2.INTER_AREA)
        squares = cv2.matchTemplate(image, template, cv2.TM_SQDIFF) / (columns * rows)
        lowest, _, (x, y), _ = cv2.minMaxLoc(squares)
        residual = lowest / (template.var() + _SEARCH_FLOOR)
        if residual < best:
            best = residual
            pose = np.array([[width / columns, 0.0, -x / columns], [0.0, height / rows, -y / rows]])
    return float(best), pose


def _refine(outer: Rgb, inner: Rgb, pose: Pose, rule: CopyRule) -> Iterator[Pose]:
    """Finer poses, best first, the search's own last.

    Corners followed from the outer image into the laid inner one (pyramidal Lucas-Kanade), an
    affine fit by seeded RANSAC, twice. Images with too few corners keep the search's pose: there
    is no detail in them that half a pixel could spoil.
    """
    poses = [pose]
    for _ in range(2):
        image, other = _working_pair(outer, inner, pose, rule.max_pixels)
        matrix = _to_pixels(pose, image, other)
        step = _correction(_luma(image), _luma(_laid(other, matrix, image)))
        if step is None:
            break
        combined = np.vstack([matrix, [0, 0, 1]]) @ np.vstack([step, [0, 0, 1]])
        pose = _from_pixels(combined[:2], image, other)
        poses.append(pose)
    yield from reversed(poses)


def _correction(image: Gray, laid: Gray) -> NDArray[np.float64] | None:
    """Affine map from `image` to `laid`, two nearly aligned images; None with too few corners."""
    corners = cv2.goodFeaturesToTrack(image, _MAX_CORNERS, 0.01, 8)
    if corners is None:
        return None
    moved, tracked, _ = cv2.calcOpticalFlowPyrLK(image, laid, corners, np.empty_like(corners))
    good = tracked[:, 0] == 1
    if good.sum() < _MIN_CORNERS:
        return None
    cv2.setRNGSeed(0)
    step, _ = cv2.estimateAffine2D(
        corners[good], moved[good], method=cv2.RANSAC, ransacReprojThreshold=1.0
    )
    return None if step is None else np.asarray(step, dtype=np.float64)


def _check(
    outer: Rgb, inner: Rgb, pose: Pose, mirrored: bool, kind: str, rule: CopyRule
) -> CopyVerdict:
    """Lay `inner` over `outer` by the pose and judge the worst tile of what they share."""
    overlap = _overlap(pose)
    if overlap < rule.min_overlap:
        return CopyVerdict(False, mirrored, overlap, np.inf, "no_alignment")
    image, other = _working_pair(outer, inner, pose, rule.max_pixels)
    shared = np.ones(image.shape[:2], np.float32)
    if kind != "same_frame":
        matrix = _to_pixels(pose, image, other)
        other, inside = _laid(other, matrix, image), np.ones(other.shape[:2], np.uint8)
        size = (image.shape[1], image.shape[0])
        inside = cv2.warpAffine(
            inside, matrix, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        )
        # Beyond a cut, the blur and the interpolation mix in pixels that only one image has.
        shared = cv2.erode(inside, np.ones((5, 5), np.uint8), borderValue=1).astype(np.float32)
    image, other = (cv2.GaussianBlur(view, (0, 0), _BLUR) for view in (image, other))
    score = _score(image.astype(np.float32), other.astype(np.float32), shared, rule)
    confirmed = score <= 1.0
    return CopyVerdict(confirmed, mirrored, overlap, score, kind if confirmed else "other_content")


def _score(a: Plane, b: Plane, shared: Plane, rule: CopyRule) -> float:
    """Worst tile of the fine band (12 px) or of the coarse one (48 px), as a part of its limit.

    Shrinking averages coding noise away *before* it is squared: a faint broad difference stays.
    """
    difference = (a - b) * shared[:, :, None]
    residual, textured = _residuals(a, b, difference, shared, _FINE_FLOOR)
    usual = float(np.percentile(residual[textured], 90)) if textured.any() else 0.0
    fine = min(rule.max_fine, rule.max_outlier * (usual + _USUAL_FLOOR))
    a, b, difference, shared = (_cells(p, _size(p, 4)) for p in (a, b, difference, shared))
    broad, _ = _residuals(a, b, difference, shared, _COARSE_FLOOR)
    return max(float(residual.max()) / fine, float(broad.max()) / rule.max_coarse)


def _residuals(
    a: Plane, b: Plane, difference: Plane, shared: Plane, floor: float
) -> tuple[Plane, NDArray[np.bool_]]:
    """Energy of the difference in each tile relative to contrast plus floor; which are textured."""
    size = _size(a, _CELL)
    inside = np.maximum(_tiles(shared, size), 1e-6)
    contrast = np.maximum(_variance(a, size), _variance(b, size))
    residual = _tiles(_energy(difference), size) / inside / (contrast + floor**2)
    # Tiles that are mostly outside the shared area have too few pixels to judge by.
    judged = inside > 0.5
    return np.where(judged, residual, 0.0), judged & (contrast > floor**2)


def _variance(image: Plane, size: tuple[int, int]) -> Plane:
    variance = _tiles(_energy(image), size) - _energy(_tiles(image, size))
    return np.asarray(variance.clip(min=0.0))


def _energy(image: Plane) -> Plane:
    """Mean square over the channels."""
    return np.asarray(cv2.transform(np.square(image), np.full((1, 3), 1 / 3, np.float32)))


def _tiles(plane: Plane, size: tuple[int, int]) -> Plane:
    return np.asarray(cv2.blur(_cells(plane, size), (3, 3), borderType=cv2.BORDER_REFLECT))


def _cells(plane: Plane, size: tuple[int, int]) -> Plane:
    return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))


def _size(image: Plane, divisor: int) -> tuple[int, int]:
    return max(1, image.shape[1] // divisor), max(1, image.shape[0] // divisor)


def _laid(inner: Rgb, matrix: NDArray[np.float64], outer: Rgb) -> Rgb:
    """`inner` drawn in the frame of `outer`."""
    laid = cv2.warpAffine(
        inner,
        matrix,
        (outer.shape[1], outer.shape[0]),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(laid, dtype=np.uint8)


def _overlap(pose: Pose) -> float:
    """Shared area as a part of the outer and of the inner frame, the smaller of the two.

    0 for a pose that turns, skews or flips: no copy of the kinds looked for has one. (Upright
    boxes also spare `cv2.intersectConvexConvex`, which loses coincident edges.)
    """
    scale = pose.diagonal()
    if scale.min() <= 0.0 or max(abs(pose[0, 1]), abs(pose[1, 0])) > _MAX_SKEW:
        return 0.0
    start, end = -pose[:, 2] / scale, (1.0 - pose[:, 2]) / scale
    shared = float(np.prod((np.minimum(end, 1.0) - np.maximum(start, 0.0)).clip(min=0.0)))
    return min(1.0, shared, shared * float(np.prod(scale)))


def _working_pair(outer: Rgb, inner: Rgb, pose: Pose, max_pixels: int) -> tuple[Rgb, Rgb]:
    """Both images at one scale: at most `max_pixels` for the outer, and neither is enlarged."""
    height, width = outer.shape[:2]
    # Pixels of the inner image per pixel of the outer one, in x and y.
    across = pose[0, 0] * inner.shape[1] / width
    down = pose[1, 1] * inner.shape[0] / height
    scale = min(1.0, across, down, np.sqrt(max_pixels / (width * height)))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    inner_size = (max(1, round(size[0] * pose[0, 0])), max(1, round(size[1] * pose[1, 1])))
    return _resized(outer, size), _resized(inner, inner_size)


def _to_pixels(pose: Pose, outer: Rgb, inner: Rgb) -> NDArray[np.float64]:
    """The pose between pixel indices; index i is the pixel whose centre lies at i + 0.5."""
    out_size = np.array(outer.shape[1::-1], np.float64)
    in_size = np.array(inner.shape[1::-1], np.float64)
    linear = pose[:, :2] * in_size[:, None] / out_size[None, :]
    shift = pose[:, 2] * in_size + linear @ [0.5, 0.5] - 0.5
    return np.column_stack([linear, shift])


def _from_pixels(matrix: NDArray[np.float64], outer: Rgb, inner: Rgb) -> Pose:
    out_size = np.array(outer.shape[1::-1], np.float64)
    in_size = np.array(inner.shape[1::-1], np.float64)
    linear = matrix[:, :2] * out_size[None, :] / in_size[:, None]
    shift = (matrix[:, 2] - matrix[:, :2] @ [0.5, 0.5] + 0.5) / in_size
    return np.column_stack([linear, shift])


def _fitted(image: Rgb, pixels: int) -> tuple[int, int]:
    scale = min(1.0, np.sqrt(pixels / (image.shape[0] * image.shape[1])))
    return max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))


def _resized(image: Rgb, size: tuple[int, int]) -> Rgb:
    if (image.shape[1], image.shape[0]) == size:
        return image
    shrinks = image.shape[1] >= size[0] and image.shape[0] >= size[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=way), dtype=np.uint8)


def _luma(image: Rgb) -> Gray:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
