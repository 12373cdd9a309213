"""Reading a scene off its pixels and comparing it with a scene graph.

Nothing here knows how an image was made: objects are segmented by color, their outlines are fitted even where another
object hides a part, and the rules of `relations.py` are applied to what was found.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from .graph import COLORS, Entity, Relation, SceneGraph
from .relations import RELATIONS, LocatedObject, Verdict
from .shapes import SHAPES, signed_distance


# What does not look like any of `SHAPES`.
UNKNOWN = "unknown"
MIN_IMAGE_SIZE = 24
# Larger images are reduced to at most this width and height: objects are then some tens of pixels wide.
WORKING_SIZE = 96
# Smaller pieces are specks, in shares of the canvas; the smallest object of the world covers 0.01.
MIN_AREA = 0.003
MAX_RADIUS = 0.3
# Least overlap of a piece with the best outline (intersection over union).
MIN_OVERLAP = 0.75
# Overlap from which an outline needs no other explanation.
CLEAR_OVERLAP = 0.92
# Blur that an outline is tried with if it does not fit as it is, standard deviations in pixels.
BLURS = (0.7, 1.2)
# What an outline gains by being visible completely: of two that fit, the one that hides less is the likelier.
_COMPLETENESS_BONUS = 0.08
_NEIGHBORS = np.ones((3, 3), dtype=bool)

# Plane of the colors without their lightness: an edge pixel lies on the line between its two sides there as well.
_CHROMA_AXES = np.array([[1.0, -0.5, -0.5], [0.0, 0.75**0.5, -(0.75**0.5)]], dtype=np.float32).T
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32) @ _CHROMA_AXES  # (num_colors, 2)
_PALETTE_CHROMA = np.linalg.norm(_PALETTE, axis=1)
_PALETTE_HUES = _PALETTE / _PALETTE_CHROMA[:, None]


@dataclass(frozen=True)
class RelationCheck:
    """
    What one relation of a graph is in an image.

    Args:
        relation ([`Relation`]):
            The relation.
        verdict ([`Verdict`]):
            Satisfied, violated or undecidable.
        reason (`str`):
            The measurement behind the verdict, in canvas units.
    """

    relation: Relation
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class SceneCheck:
    """
    What an image shows of a scene graph.

    Sizes are not judged: no two objects of a graph differ in nothing but their size word, so that a wrong size never
    makes an image show another scene.

    Args:
        relations (`list[RelationCheck]`):
            One per relation of the graph, in its order.
        objects (`list[LocatedObject]`):
            Everything found, the largest first.
        missing (`list[Entity]`):
            Entities that are not in the image.
        duplicated (`list[Entity]`):
            Entities that are in the image more than once.
        extra (`list[LocatedObject]`):
            Objects that the graph does not name.
        remark (`str`, *optional*):
            What the image is if it shows no object at all: blank or noise.
    """

    relations: list[RelationCheck]
    objects: list[LocatedObject]
    missing: list[Entity]
    duplicated: list[Entity]
    extra: list[LocatedObject]
    remark: str | None = None

    @property
    def is_correct(self) -> bool:
        """Whether every entity is there exactly once and every relation is satisfied."""
        return not (self.missing or self.duplicated) and all(c.verdict == Verdict.SATISFIED for c in self.relations)

    @property
    def reasons(self) -> list[str]:
        """Everything that keeps the image from being correct, in words."""
        return [
            *([self.remark] if self.remark else []),
            *(f"{entity} is missing" for entity in self.missing),
            *(f"{entity} is there more than once" for entity in self.duplicated),
            *(f"{c.relation} is {c.verdict}: {c.reason}" for c in self.relations if c.verdict != Verdict.SATISFIED),
        ]


def check_scene(image: Image.Image | np.ndarray, graph: SceneGraph) -> SceneCheck:
    """
    Compare an image with a scene graph, from its pixels alone.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)` and type `uint8`):
            The image, see [`locate_objects`].
        graph ([`SceneGraph`]):
            What it should show.

    Returns:
        [`SceneCheck`]: a verdict with its reason per relation, and which entities are missing or duplicated. A relation
        of such an entity is undecidable.

    Example:

    ```python
    >>> check = check_scene(render_scene(graph, seed=0), graph)
    >>> check.is_correct, check.reasons
    (True, [])
    ```
    """
    objects = locate_objects(image)
    found = {
        entity: [o for o in objects if (o.color, o.shape) == (entity.color, entity.shape)] for entity in graph.entities
    }
    named = {(entity.color, entity.shape) for entity in graph.entities}
    return SceneCheck(
        relations=[_check_relation(relation, found, objects) for relation in graph.relations],
        objects=objects,
        missing=[entity for entity, matches in found.items() if not matches],
        duplicated=[entity for entity, matches in found.items() if len(matches) > 1],
        extra=[o for o in objects if (o.color, o.shape) not in named],
        remark=None if objects else _describe_empty(_to_array(image)),
    )


def _check_relation(
    relation: Relation, found: dict[Entity, list[LocatedObject]], objects: Sequence[LocatedObject]
) -> RelationCheck:
    for entity in relation.arguments:
        matches = found[entity]
        if len(matches) == 1:
            continue
        if matches:
            reason = f"{entity} is there {len(matches)} times"
        else:
            others = sorted({o.shape for o in objects if o.color == entity.color})
            seen = f"; of that color there is: {', '.join(others)}" if others else ""
            reason = f"{entity} is missing{seen}"
        return RelationCheck(relation, Verdict.UNDECIDABLE, reason)
    arguments = [found[entity][0] for entity in relation.arguments]
    return RelationCheck(relation, *RELATIONS[relation.name].check(arguments, relation.region))


def _describe_empty(pixels: np.ndarray) -> str:
    """Blank or noise: neighboring pixels of noise differ."""
    lightness = pixels.mean(axis=2)
    roughness = np.abs(np.diff(lightness, axis=1)).mean() + np.abs(np.diff(lightness, axis=0)).mean()
    return "the image is noise" if roughness > 25.0 else "the image is blank"


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
    pixels = _to_array(image)
    height, width = pixels.shape[:2]
    factor = -(-max(height, width) // WORKING_SIZE)
    if factor > 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
    segmentation = _segment(pixels)
    objects = []
    for color, pieces in segmentation.pieces.items():
        for piece, outline in _fit_pieces(pieces, color, segmentation):
            objects.append(_locate(piece, outline, color, (height, width), factor))
    return sorted(objects, key=lambda o: -int(o.mask.sum()))


# Segmentation: pixels → pieces of one color each.


@dataclass(frozen=True)
class _Segmentation:
    chroma: np.ndarray  # (height, width, 2), the background's subtracted
    labels: np.ndarray  # (height, width), index of the color, or one of the two below
    pieces: dict[int, list[np.ndarray]]  # index of the color → masks (height, width), the largest first

    def surrounding(self, piece: np.ndarray, color: int, rows: slice, columns: slice) -> np.ndarray:
        """Chroma `(height, width, 2)` of what a piece mixes with at its edges: another piece or the background."""
        labels = self.labels[rows, columns]
        is_near = _dilate(piece[rows, columns])
        is_inner = (piece[rows, columns] | (labels == _SEAM)) & ~_dilate(labels == _BACKGROUND, 2)
        chroma = np.zeros((*labels.shape, 2), dtype=np.float32)
        for other in self.pieces:
            is_other = labels == other
            if other != color and is_other.any():
                adjacent = _dilate(is_other)
                area = is_other | (adjacent & is_near) | (_dilate(adjacent) & is_inner)
                chroma[area] = np.median(self.chroma[rows, columns][is_other], axis=0)
        return chroma


_BACKGROUND = -1
_SEAM = -2  # between two objects, where their colors mix


def _dilate(mask: np.ndarray, num_steps: int = 1) -> np.ndarray:
    """The mask and all pixels up to `num_steps` away, diagonals included."""
    for _ in range(num_steps):
        wide = mask.copy()
        wide[:, 1:] |= mask[:, :-1]
        wide[:, :-1] |= mask[:, 1:]
        mask = wide.copy()
        mask[1:] |= wide[:-1]
        mask[:-1] |= wide[1:]
    return mask


def _to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """The image as an array `(height, width, 3)` of type `uint8`."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"The image is an array of shape {image.shape} and type {image.dtype}; give a PIL image or an array of "
            "shape (height, width, 3) and type uint8."
        )
    if min(image.shape[:2]) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"The image is {image.shape[1]}x{image.shape[0]} pixels; shapes can be told apart from {MIN_IMAGE_SIZE} "
            "pixels on. Generate it larger."
        )
    return image


def _segment(pixels: np.ndarray) -> _Segmentation:
    chroma = pixels.reshape(-1, 3).astype(np.float32) @ _CHROMA_AXES
    strength = chroma @ _PALETTE_HUES.T  # (num_pixels, num_colors)
    nearest = strength.argmax(axis=1)
    share = strength.max(axis=1) / _PALETTE_CHROMA[nearest]
    plain = chroma[share < 0.35]
    if len(plain):
        chroma = chroma - np.median(plain, axis=0)
    labels = np.where(share >= 0.5, nearest, _BACKGROUND).reshape(pixels.shape[:2])
    chroma = chroma.reshape(*labels.shape, 2)
    smallest = max(MIN_AREA * labels.size, 3)
    candidates = []
    for color in np.flatnonzero(np.bincount(labels[labels >= 0], minlength=len(_PALETTE)) >= smallest):
        numbered, _ = ndimage.label(labels == color, structure=_NEIGHBORS)
        areas = np.bincount(numbered.ravel())
        areas[0] = 0
        order = [number for number in np.argsort(-areas) if areas[number] >= smallest]
        candidates += [(int(color), numbered == number) for number in order]
    pieces: dict[int, list[np.ndarray]] = defaultdict(list)
    num_near, is_piece = np.zeros(labels.shape, dtype=np.int8), np.zeros(labels.shape, dtype=bool)
    for color, mask in candidates:
        if not _is_fringe(mask, color, candidates):
            pieces[color].append(mask)
            is_piece |= mask
            num_near += _dilate(mask, 2)
    labels[(labels >= 0) & ~is_piece & (num_near >= 2)] = _SEAM
    return _Segmentation(chroma, labels, dict(pieces))


def _is_fringe(piece: np.ndarray, color: int, candidates: list[tuple[int, np.ndarray]]) -> bool:
    """Whether a piece is only the seam between two objects whose colors mix to a third."""
    if piece.sum() > 0.03 * piece.size or ndimage.binary_erosion(piece, _NEIGHBORS, iterations=2).any():
        return False
    border = _dilate(piece) & ~piece
    touching = [other for other, mask in candidates if other != color and (border & mask).sum() > 1]
    return any(_is_mixture(color, first, second) for i, first in enumerate(touching) for second in touching[:i])


def _is_mixture(color: int, first: int, second: int) -> bool:
    """Whether mixtures of two palette colors are taken for a third."""
    share = np.linspace(0.0, 1.0, 9)[:, None]
    mixed = share * _PALETTE[first] + (1 - share) * _PALETTE[second]
    return bool(((mixed @ _PALETTE_HUES.T).argmax(axis=1) == color).any())


# Outlines: pieces → shape, place and size.


@dataclass(frozen=True)
class _Outline:
    shape: str
    x: float  # center, in pixels
    y: float
    radius: float
    overlap: float  # of the outline and the piece where nothing can hide either, in [0, 1]
    completeness: float


@dataclass(frozen=True)
class _Evidence:
    """What the pixels around a piece say about its outline, on a crop."""

    x: np.ndarray  # (1, width), centers of the crop's pixels
    y: np.ndarray  # (height, 1)
    coverage: np.ndarray  # (height, width), share of each pixel that the piece covers
    weight: np.ndarray  # (height, width), 0 where another object can hide the piece
    is_piece: np.ndarray  # (height, width)


def _fit_pieces(
    pieces: list[np.ndarray], color: int, segmentation: _Segmentation
) -> list[tuple[np.ndarray, _Outline]]:
    """Outlines of the pieces of one color; pieces inside the outline of a larger one are parts of it."""
    fitted = []
    rest = list(pieces)
    while rest:
        piece, *rest = rest
        outline = _fit_outline(piece, color, segmentation)
        y, x = np.ogrid[: piece.shape[0], : piece.shape[1]]
        inside = signed_distance(outline.shape, x + 0.5 - outline.x, y + 0.5 - outline.y, outline.radius) < 1.0
        parts = [other for other in rest if (other & inside).sum() > 0.7 * other.sum()]
        if parts:
            rest = [other for other in rest if not any(other is part for part in parts)]
            piece = np.logical_or.reduce([piece, *parts])
            outline = _fit_outline(piece, color, segmentation)
        fitted.append((piece, outline))
    return fitted


def _fit_outline(piece: np.ndarray, color: int, segmentation: _Segmentation) -> _Outline:
    """The outline of a piece in front of everything, or else one of which others hide a part."""
    evidence = _gather_evidence(piece, color, segmentation, margin=3)
    starts = _starts_from_moments(evidence)
    outlines = [_best_outline(evidence, shape, start) for shape, start in starts.items()]
    if max(o.overlap for o in outlines) < CLEAR_OVERLAP:
        outlines = [_blur_outline(evidence, outline) for outline in outlines]
        outlines += _fit_hidden(piece, color, segmentation, starts)
    return max(outlines, key=lambda o: o.overlap + _COMPLETENESS_BONUS * o.completeness)


def _fit_hidden(
    piece: np.ndarray, color: int, segmentation: _Segmentation, starts: dict[str, np.ndarray]
) -> list[_Outline]:
    """Outlines of a piece that others hide a part of; none if none can."""
    foreign = _dilate((segmentation.labels != _BACKGROUND) & ~piece, 2)
    touching = foreign & piece
    border = _dilate(piece) & ~piece
    # what another object surrounds is in front of it
    if not touching.any() or (border & ~foreign).sum() <= 0.2 * border.sum():
        return []
    evidence = _gather_evidence(piece, color, segmentation, int(MAX_RADIUS * max(piece.shape)), foreign)
    boxed = _starts_from_box(piece, touching)
    outlines = [_best_outline(evidence, shape, np.concatenate([start, boxed])) for shape, start in starts.items()]
    best = max(o.overlap for o in outlines)
    outlines = [_refine_outline(evidence, outline) for outline in outlines if outline.overlap > best - 0.2]
    if max(o.overlap for o in outlines) < CLEAR_OVERLAP:
        outlines = [_blur_outline(evidence, outline) for outline in outlines]
    return outlines


def _gather_evidence(
    piece: np.ndarray, color: int, segmentation: _Segmentation, margin: int, foreign: np.ndarray | None = None
) -> _Evidence:
    """Crop around a piece. Pixels of `foreign` say nothing about its outline, if given."""
    top, bottom, left, right = _bounding_box(piece)
    rows, columns = slice(max(top - margin, 0), bottom + margin + 1), slice(max(left - margin, 0), right + margin + 1)
    is_piece, chroma = piece[rows, columns], segmentation.chroma[rows, columns]
    surrounding = segmentation.surrounding(piece, color, rows, columns)
    contrast = np.median(chroma[is_piece], axis=0) - surrounding
    coverage = ((chroma - surrounding) * contrast).sum(axis=2) / np.maximum((contrast**2).sum(axis=2), 1.0)
    coverage[~_dilate(is_piece, 2)] = 0.0
    is_other = ~is_piece & (segmentation.labels[rows, columns] != _SEAM)
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
        is_piece=is_piece,
    )


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row, first and last column."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


# Area of a shape of radius 1, and how far below its center its centroid lies.
_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "diamond": 2.0}
_CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "diamond": 0.0}


def _starts_from_moments(evidence: _Evidence) -> dict[str, np.ndarray]:
    """Outline `(1, 3)` of every shape with the piece's area and centroid: exact, blurred or not, where nothing is hidden."""
    mass = evidence.coverage * evidence.weight
    area = max(float(mass.sum()), 1.0)
    x, y = float((mass * evidence.x).sum()) / area, float((mass * evidence.y).sum()) / area
    starts = {}
    for shape in SHAPES:
        radius = (area / _AREAS[shape]) ** 0.5
        starts[shape] = np.array([[x, y - _CENTROIDS[shape] * radius, radius]], dtype=np.float32)
    return starts


def _starts_from_box(piece: np.ndarray, touching: np.ndarray) -> np.ndarray:
    """Outlines `(num_starts, 3)` with the piece's bounding box at every side where nothing can hide it."""
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


def _render(evidence: _Evidence, shape: str, outlines: np.ndarray, blur: float = 0.0) -> np.ndarray:
    """Coverage `(num_outlines, height, width)` of outlines `(num_outlines, 3)`."""
    x, y, radius = (outlines[:, i, None, None] for i in range(3))
    coverage = np.clip(0.5 - signed_distance(shape, evidence.x - x, evidence.y - y, radius), 0.0, 1.0)
    return ndimage.gaussian_filter(coverage, (0.0, blur, blur), truncate=2.5) if blur else coverage


def _overlap(evidence: _Evidence, rendered: np.ndarray) -> np.ndarray:
    """Intersection over union `(num_outlines,)` of outlines with the piece."""
    coverage = np.clip(evidence.coverage, 0.0, 1.0)
    intersection = (np.minimum(rendered, coverage) * evidence.weight).sum(axis=(1, 2))
    union = (np.maximum(rendered, coverage) * evidence.weight).sum(axis=(1, 2))
    return intersection / union


def _best_outline(evidence: _Evidence, shape: str, starts: np.ndarray) -> _Outline:
    rendered = _render(evidence, shape, starts)
    overlaps = _overlap(evidence, rendered)
    best = int(overlaps.argmax())
    area = max(int((rendered[best] >= 0.5).sum()), 1)
    x, y, radius = starts[best].tolist()
    return _Outline(shape, x, y, radius, float(overlaps[best]), min(float(evidence.is_piece.sum() / area), 1.0))


def _blur_outline(evidence: _Evidence, outline: _Outline) -> _Outline:
    """The same outline with the overlap that it has where the image is blurred."""
    start = np.array([[outline.x, outline.y, outline.radius]], dtype=np.float32)
    overlaps = [float(_overlap(evidence, _render(evidence, outline.shape, start, blur))[0]) for blur in BLURS]
    return replace(outline, overlap=max(outline.overlap, *overlaps))


def _refine_outline(evidence: _Evidence, outline: _Outline) -> _Outline:
    """Gauss-Newton steps on the difference between the coverage of an outline and of the piece."""
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


def _locate(piece: np.ndarray, outline: _Outline, color: int, size: tuple[int, int], factor: int) -> LocatedObject:
    """The object in canvas units, its mask at the size of the image."""
    height, width = size
    side = max(height, width)
    mask = piece.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width] if factor > 1 else piece
    return LocatedObject(
        color=list(COLORS)[color],
        shape=outline.shape if outline.overlap >= MIN_OVERLAP else UNKNOWN,
        x=(outline.x * factor + (side - width) / 2) / side,
        y=(outline.y * factor + (side - height) / 2) / side,
        radius=outline.radius * factor / side,
        completeness=outline.completeness,
        mask=mask,
    )
