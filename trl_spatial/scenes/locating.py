"""Locates the colored shapes of an image: pixels → pieces of one color → outlines.

Nothing here depends on how an image was made. Pixels are assigned to palette colors by hue, connected pixels form
pieces, and an outline is fitted to every piece, even if another object hides part of it.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy  # loads `ndimage` when it is first used
from PIL import Image

from .graph import COLORS
from .relations import LocatedObject
from .segmentation import BACKGROUND, LUMA_AXIS, SEAM, Segmentation, dilate, is_noise, segment, to_array
from .shapes import SHAPES, signed_distance


# Shape of an object that fits none of `SHAPES`.
UNKNOWN = "unknown"
# Larger images are reduced and smaller ones enlarged, so that objects are about ten to forty pixels wide.
SMALLEST_SIDE, LARGEST_SIDE = 64, 112
MAX_RADIUS = 0.3
# Minimum overlap (intersection over union) of a piece with its best outline.
MIN_OVERLAP = 0.75
# From this overlap on, an outline is accepted without trying a partly hidden one.
CLEAR_OVERLAP = 0.88
# Otherwise a partly hidden outline must gain this much overlap. Measured gains: at most 0.08 for fully visible
# objects, at least 0.16 for partly hidden ones.
HIDDEN_MARGIN = 0.13
# Overlap of the clearest object in a sharp image. Below it, these blurs are tried, standard deviations in pixels.
SHARP_OVERLAP = 0.97
BLURS = (0.5, 0.8, 1.1, 1.5)
# Bonus of a completely visible outline: of two that fit, the one with less of it hidden is more likely.
_COMPLETENESS_BONUS = 0.08
# Weight of lightness over chroma at the edges of blurred images: JPEG stores it at twice the resolution.
LUMA_WEIGHT = 15.0


def locate_objects(image: Image.Image | np.ndarray) -> list[LocatedObject]:
    """
    Find the colored shapes of an image and fit their outlines.

    Pixels are assigned to the nearest palette color by hue, connected pixels form pieces, and to every piece the outline
    is fitted that explains it best where no other object can hide it. So a half-hidden square is found as a square with
    its full outline. It tolerates what measurements in `tests/scenes/test_checking.py` cover: blur, noise, JPEG.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)` and type `uint8`):
            The image, of any mode and any size from 24 pixels. Canvas units are shares of the longer side; a shorter
            side is centered in `[0, 1]`.

    Returns:
        `list[LocatedObject]`: the objects, the largest visible one first. The shape is `"unknown"` where no shape fits.

    Raises:
        `ValueError`: if the image is too small or the array has another shape or type.
    """
    pixels = to_array(image)
    if is_noise(pixels):
        return []
    height, width = pixels.shape[:2]
    scale = _working_scale(max(height, width))
    if scale < 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(round(1 / scale)))
    elif scale > 1:
        larger = (round(width * scale), round(height * scale))
        pixels = np.asarray(Image.fromarray(pixels).resize(larger, Image.Resampling.BICUBIC))
    segmentation = segment(pixels)
    segmentation = replace(segmentation, blur=_estimate_blur(segmentation))
    if segmentation.blur:
        segmentation = replace(segmentation, luma=pixels @ LUMA_AXIS, blur=0.0)
        segmentation = replace(segmentation, blur=_estimate_blur(segmentation))
    objects = []
    for color, pieces in segmentation.pieces.items():
        for piece, outline in _fit_pieces(pieces, color, segmentation):
            objects.append(_locate(piece, outline, color, (height, width), scale))
    return sorted(objects, key=lambda o: -int(o.mask.sum()))


def _working_scale(side: int) -> float:
    """
    Return the factor that scales an image of this side to a size at which objects are neither tiny nor slow to fit.
    """
    return 1 / -(-side // LARGEST_SIDE) if side > LARGEST_SIDE else max(round(SMALLEST_SIDE / side), 1)


# Outlines: pieces → shape, place and size.


@dataclass(frozen=True)
class _Outline:
    shape: str
    x: float  # center, in pixels
    y: float
    radius: float
    overlap: float  # intersection over union with the piece, in [0, 1], ignoring pixels where either can be hidden
    completeness: float


@dataclass(frozen=True)
class _Evidence:
    """Evidence of the outline of a piece, on a crop around it."""

    x: np.ndarray  # (1, width), centers of the crop's pixels
    y: np.ndarray  # (height, 1)
    coverage: np.ndarray  # (height, width), share of each pixel that the piece covers
    weight: np.ndarray  # (height, width), 0 where another object can hide the piece, otherwise 1
    blur: float = 0.0


def _estimate_blur(segmentation: Segmentation) -> float:
    """Return the blur, a standard deviation in pixels, with which the clearest object of the image fits best."""
    views = []
    for color, pieces in segmentation.pieces.items():
        for piece in pieces:
            evidence = _gather_evidence(piece, color, segmentation, margin=3)
            views.append((_fit_front(evidence, _starts_from_moments(evidence)).overlap, evidence))
            if views[-1][0] >= SHARP_OVERLAP:
                return 0.0
    if not views:
        return 0.0
    overlap, evidence = max(views, key=lambda view: view[0])
    overlaps = {0.0: overlap}
    for blur in BLURS:
        blurred = replace(evidence, blur=blur)
        overlaps[blur] = _fit_front(blurred, _starts_from_moments(blurred)).overlap
    return max(overlaps, key=overlaps.__getitem__)


def _fit_pieces(pieces: list[np.ndarray], color: int, segmentation: Segmentation) -> list[tuple[np.ndarray, _Outline]]:
    """Fit outlines to the pieces of one color; pieces inside the outline of a larger one are merged into it."""
    fitted = []
    rest = list(pieces)
    while rest:
        piece, *rest = rest
        outline = _fit_outline(piece, color, segmentation)
        y, x = np.ogrid[: piece.shape[0], : piece.shape[1]]
        inside = signed_distance(outline.shape, x + 0.5 - outline.x, y + 0.5 - outline.y, outline.radius) < 1.0
        is_part = [bool((other & inside).sum() > 0.7 * other.sum()) for other in rest]
        if any(is_part):
            piece = np.logical_or.reduce([piece, *(other for other, part in zip(rest, is_part, strict=True) if part)])
            rest = [other for other, part in zip(rest, is_part, strict=True) if not part]
            outline = _fit_outline(piece, color, segmentation)
        fitted.append((piece, outline))
    return fitted


def _fit_outline(piece: np.ndarray, color: int, segmentation: Segmentation) -> _Outline:
    """Fit the outline of a piece: one that is fully visible or, if that fits clearly better, a partly hidden one."""
    evidence = _gather_evidence(piece, color, segmentation, margin=3)
    starts = _starts_from_moments(evidence)
    front = _fit_front(evidence, starts)
    if front.overlap >= CLEAR_OVERLAP:
        return front
    hidden = _fit_hidden(piece, color, segmentation, starts)
    best = max(hidden, key=lambda o: o.overlap + _COMPLETENESS_BONUS * o.completeness, default=front)
    return best if best.overlap > front.overlap + HIDDEN_MARGIN else front


def _fit_front(evidence: _Evidence, starts: dict[str, np.ndarray]) -> _Outline:
    return max((_best_outline(evidence, shape, start) for shape, start in starts.items()), key=lambda o: o.overlap)


def _fit_hidden(
    piece: np.ndarray, color: int, segmentation: Segmentation, starts: dict[str, np.ndarray]
) -> list[_Outline]:
    """Fit outlines that other objects partly hide; returns an empty list if nothing can hide the piece."""
    foreign = segmentation.foreign(piece)
    touching = foreign & piece
    border = dilate(piece) & ~piece
    # a piece that is surrounded by another object is in front of it
    if not touching.any() or (border & ~foreign).sum() <= 0.2 * border.sum():
        return []
    evidence = _gather_evidence(piece, color, segmentation, int(MAX_RADIUS * max(piece.shape)), foreign)
    boxed = _starts_from_box(piece, touching)
    outlines = [_best_outline(evidence, shape, np.concatenate([start, boxed])) for shape, start in starts.items()]
    best = max(o.overlap for o in outlines)
    return [_refine_outline(evidence, outline) for outline in outlines if outline.overlap > best - 0.2]


def _gather_evidence(
    piece: np.ndarray, color: int, segmentation: Segmentation, margin: int, foreign: np.ndarray | None = None
) -> _Evidence:
    """Collect the evidence on a crop around a piece. Pixels of `foreign`, if given, say nothing about its outline."""
    top, bottom, left, right = _bounding_box(piece)
    rows, columns = slice(max(top - margin, 0), bottom + margin + 1), slice(max(left - margin, 0), right + margin + 1)
    is_piece, chroma = piece[rows, columns], segmentation.chroma[rows, columns]
    surrounding = segmentation.surrounding(piece, color, rows, columns)
    contrast = np.median(chroma[is_piece], axis=0) - surrounding
    strength = (contrast**2).sum(axis=2)  # (height, width)
    coverage = ((chroma - surrounding) * contrast).sum(axis=2) / np.maximum(strength, 1.0)
    if segmentation.luma is not None:
        is_plain = segmentation.labels[rows, columns] == BACKGROUND
        coverage = _mix_in_luma(coverage, strength, segmentation.luma[rows, columns], is_piece, is_plain)
    coverage[~dilate(is_piece, 2)] = 0.0
    is_other = ~is_piece & (segmentation.labels[rows, columns] != SEAM)
    coverage[is_other] = np.minimum(coverage[is_other], 0.5)
    weight = np.ones(is_piece.shape, dtype=np.float32)
    if foreign is not None:
        coverage[foreign[rows, columns] & is_piece] = 1.0
        weight[foreign[rows, columns] & ~is_piece] = 0.0
    return _Evidence(
        x=np.arange(columns.start, columns.start + is_piece.shape[1], dtype=np.float32)[None] + 0.5,
        y=np.arange(rows.start, rows.start + is_piece.shape[0], dtype=np.float32)[:, None] + 0.5,
        coverage=np.clip(coverage, -0.5, 1.5).astype(np.float32),
        weight=weight,
        blur=segmentation.blur,
    )


def _mix_in_luma(
    coverage: np.ndarray, strength: np.ndarray, luma: np.ndarray, is_piece: np.ndarray, is_plain: np.ndarray
) -> np.ndarray:
    """Refine the coverage `(height, width)` by chroma with lightness, in the piece and on the background."""
    around = is_plain & ~dilate(is_piece)
    if not around.any():
        return coverage
    low = np.median(luma[around])
    step = np.median(luma[is_piece]) - low
    luma_strength = LUMA_WEIGHT * step**2
    if not luma_strength:
        return coverage
    share = luma_strength / (luma_strength + strength)
    mixed = (1 - share) * coverage + share * np.clip((luma - low) / step, -0.5, 1.5)
    return np.where(is_piece | is_plain, mixed, coverage)


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the first and last row, and the first and last column, of a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


# Area of a shape of radius 1, and the distance of its centroid below its center.
_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "diamond": 2.0}
_CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "diamond": 0.0}


def _starts_from_moments(evidence: _Evidence) -> dict[str, np.ndarray]:
    """Return an outline `(1, 3)` per shape with the piece's area and centroid: exact if nothing is hidden."""
    mass = evidence.coverage * evidence.weight
    area = max(float(mass.sum()), 1.0)
    x, y = float((mass * evidence.x).sum()) / area, float((mass * evidence.y).sum()) / area
    starts = {}
    for shape in SHAPES:
        radius = (area / _AREAS[shape]) ** 0.5
        starts[shape] = np.array([[x, y - _CENTROIDS[shape] * radius, radius]], dtype=np.float32)
    return starts


def _starts_from_box(piece: np.ndarray, touching: np.ndarray) -> np.ndarray:
    """
    Return outlines `(num_starts, 3)` that agree with the piece's bounding box on every side where nothing can hide it.
    """
    top, bottom, left, right = _bounding_box(piece)
    is_open = [
        bool(touching[top : top + 2].any()),
        bool(touching[bottom - 1 : bottom + 1].any()),
        bool(touching[:, left : left + 2].any()),
        bool(touching[:, right - 1 : right + 1].any()),
    ]
    height, width = bottom + 1.0 - top, right + 1.0 - left
    largest = MAX_RADIUS * max(piece.shape)
    radii = max(height, width) / 2 * np.array([1.0, 1.08, 1.17, 1.27, 1.4, 1.6, 1.8, 2.0])
    if not any(is_open[:2]):
        radii = np.array([height / 2])
    if not any(is_open[2:]):
        radii = np.array([width / 2])
    starts = [
        (x, y, radius)
        for radius in radii[radii <= largest]
        for x in _centers(left, right + 1.0, radius, *is_open[2:])
        for y in _centers(top, bottom + 1.0, radius, *is_open[:2])
    ]
    return np.array(starts, dtype=np.float32).reshape(-1, 3)


def _centers(low: float, high: float, radius: float, is_low_open: bool, is_high_open: bool) -> list[float]:
    if is_low_open and is_high_open:
        return [low + radius, (low + high) / 2, high - radius] if 2 * radius > high - low else [(low + high) / 2]
    if is_low_open:
        return [high - radius]
    if is_high_open:
        return [low + radius]
    return [(low + high) / 2]


def _render(evidence: _Evidence, shape: str, outlines: np.ndarray) -> np.ndarray:
    """Render outlines `(num_outlines, 3)` to coverage `(num_outlines, height, width)`."""
    x, y, radius = (outlines[:, i, None, None] for i in range(3))
    coverage = np.clip(0.5 - signed_distance(shape, evidence.x - x, evidence.y - y, radius), 0.0, 1.0)
    if evidence.blur:
        scipy.ndimage.gaussian_filter(coverage, (0.0, evidence.blur, evidence.blur), truncate=2.5, output=coverage)
    return coverage


def _overlap(evidence: _Evidence, rendered: np.ndarray) -> np.ndarray:
    """Return the intersection over union `(num_outlines,)` of rendered outlines with the piece."""
    coverage = np.clip(evidence.coverage, 0.0, 1.0)
    intersection = (np.minimum(rendered, coverage) * evidence.weight).sum(axis=(1, 2))
    union = (np.maximum(rendered, coverage) * evidence.weight).sum(axis=(1, 2))
    return intersection / union


def _best_outline(evidence: _Evidence, shape: str, starts: np.ndarray) -> _Outline:
    rendered = _render(evidence, shape, starts)
    overlaps = _overlap(evidence, rendered)
    best = int(overlaps.argmax())
    visible = float((evidence.coverage * evidence.weight).sum())
    x, y, radius = starts[best].tolist()
    completeness = min(visible / max(float(rendered[best].sum()), 1.0), 1.0)
    return _Outline(shape, x, y, radius, float(overlaps[best]), completeness)


def _refine_outline(evidence: _Evidence, outline: _Outline) -> _Outline:
    """Take Gauss-Newton steps on the difference of the coverages of outline and piece, as long as they help."""
    steps = 0.25 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    coverage = np.clip(evidence.coverage, 0.0, 1.0) * evidence.weight
    for _ in range(3):
        start = np.array([outline.x, outline.y, outline.radius], dtype=np.float32)
        rendered = _render(evidence, outline.shape, start + steps) * evidence.weight
        jacobian = ((rendered[1:] - rendered[0]) / 0.25).reshape(3, -1)
        residual = (coverage - rendered[0]).ravel()
        step = np.linalg.solve(jacobian @ jacobian.T + 1e-2 * np.eye(3), jacobian @ residual)
        trial = _best_outline(evidence, outline.shape, (start + np.clip(step, -2.0, 2.0)).astype(np.float32)[None])
        if trial.overlap <= outline.overlap:
            break
        outline = trial
    return outline


def _locate(piece: np.ndarray, outline: _Outline, color: int, size: tuple[int, int], scale: float) -> LocatedObject:
    """Convert an outline to an object in canvas units, with its mask at the size of the image."""
    height, width = size
    side = max(height, width)
    rows, columns = ((np.arange(length) + 0.5) * scale for length in size)
    return LocatedObject(
        color=list(COLORS)[color],
        shape=outline.shape if outline.overlap >= MIN_OVERLAP else UNKNOWN,
        x=(outline.x / scale + (side - width) / 2) / side,
        y=(outline.y / scale + (side - height) / 2) / side,
        radius=outline.radius / scale / side,
        completeness=outline.completeness,
        mask=piece if scale == 1 else piece[np.ix_(rows.astype(int), columns.astype(int))],
    )
