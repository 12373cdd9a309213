"""Segments an image into pieces of one color: the first step of locating its colored shapes."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import scipy  # loads `ndimage` when it is first used
from PIL import Image

from .graph import COLORS


MIN_IMAGE_SIZE = 24
# Median difference of neighbors above which an image is noise: that of independent noise of standard deviation 32.
NOISE_STEP = 30
# Share of the canvas below which a piece is a speck; the smallest object of the world covers 0.01.
MIN_AREA = 0.003
_NEIGHBORS = np.ones((3, 3), dtype=bool)

# Projects colors to a plane without lightness; linear, so that edge pixels stay on the line between their two sides.
_CHROMA_AXES = np.array([[1.0, -0.5, -0.5], [0.0, 0.75**0.5, -(0.75**0.5)]], dtype=np.float32).T
LUMA_AXIS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32) @ _CHROMA_AXES  # (num_colors, 2)
_PALETTE_CHROMA = np.linalg.norm(_PALETTE, axis=1)
_PALETTE_HUES = _PALETTE / _PALETTE_CHROMA[:, None]
BACKGROUND = -1
SEAM = -2  # between two objects, where their colors mix


@dataclass(frozen=True)
class Segmentation:
    """An image whose pixels are assigned to colors, and the connected pieces of each color."""

    chroma: np.ndarray  # (height, width, 2), relative to the background
    labels: np.ndarray  # (height, width), index of the color, `BACKGROUND` or `SEAM`
    pieces: dict[int, list[np.ndarray]]  # index of the color → masks (height, width), the largest first
    blur: float = 0.0  # blur of the image, a standard deviation in pixels
    luma: np.ndarray | None = None  # (height, width), lightness, only if the image is not sharp

    def foreign(self, piece: np.ndarray) -> np.ndarray:
        """Pixels `(height, width)` of other objects and of the seam to them, which can look like background."""
        near = dilate((self.labels != BACKGROUND) & ~piece, 2)
        # blurred seams are wider
        return near if not self.blur or (near & piece).any() else dilate(near)

    def surrounding(self, piece: np.ndarray, color: int, rows: slice, columns: slice) -> np.ndarray:
        """Chroma `(height, width, 2)` of what a piece mixes with at its edges: another piece or the background."""
        labels = self.labels[rows, columns]
        is_near = dilate(piece[rows, columns])
        is_inner = (piece[rows, columns] | (labels == SEAM)) & ~dilate(labels == BACKGROUND, 2)
        chroma = np.zeros((*labels.shape, 2), dtype=np.float32)
        for other in self.pieces:
            is_other = labels == other
            if other != color and is_other.any():
                adjacent = dilate(is_other)
                area = is_other | (adjacent & is_near) | (dilate(adjacent) & is_inner)
                chroma[area] = np.median(self.chroma[rows, columns][is_other], axis=0)
        return chroma


def dilate(mask: np.ndarray, num_steps: int = 1) -> np.ndarray:
    """Return the mask extended by all pixels up to `num_steps` away, diagonals included."""
    for _ in range(num_steps):
        wide = mask.copy()
        wide[:, 1:] |= mask[:, :-1]
        wide[:, :-1] |= mask[:, 1:]
        mask = wide.copy()
        mask[1:] |= wide[:-1]
        mask[:-1] |= wide[1:]
    return mask


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """The image as an array `(height, width, 3)` of type `uint8`; what is transparent shows white."""
    if isinstance(image, Image.Image):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
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


def is_noise(pixels: np.ndarray) -> bool:
    """Whether most neighboring pixels `(height, width, 3)` differ more than in any picture."""
    steps = np.abs(np.diff(pixels[::2].astype(np.int16), axis=1))
    return bool(np.median(steps) > NOISE_STEP)


def segment(pixels: np.ndarray) -> Segmentation:
    """
    Segment an image `(height, width, 3)` into pieces of one color; seams between two objects do not count as pieces.
    """
    chroma = pixels.reshape(-1, 3).astype(np.float32) @ _CHROMA_AXES
    strength = chroma @ _PALETTE_HUES.T  # (num_pixels, num_colors)
    nearest = strength.argmax(axis=1)
    share = strength.max(axis=1) / _PALETTE_CHROMA[nearest]
    plain = chroma[share < 0.35]
    if len(plain):
        chroma = chroma - np.median(plain, axis=0)
    labels = np.where(share >= 0.5, nearest, BACKGROUND).reshape(pixels.shape[:2])
    chroma = chroma.reshape(*labels.shape, 2)
    smallest = max(MIN_AREA * labels.size, 3)
    candidates: list[tuple[int, np.ndarray]] = []
    for color in np.flatnonzero(np.bincount(labels[labels >= 0], minlength=len(_PALETTE)) >= smallest).tolist():
        numbered, _ = scipy.ndimage.label(labels == color, structure=_NEIGHBORS)
        areas = np.bincount(numbered.ravel())
        areas[0] = 0
        order = [number for number in np.argsort(-areas) if areas[number] >= smallest]
        candidates += [(color, numbered == number) for number in order]
    pieces: dict[int, list[np.ndarray]] = defaultdict(list)
    num_near, is_piece = np.zeros(labels.shape, dtype=np.int8), np.zeros(labels.shape, dtype=bool)
    for color, mask in candidates:
        if not _is_fringe(mask, color, candidates):
            pieces[color].append(mask)
            is_piece |= mask
            num_near += dilate(mask, 2)
    labels[(labels >= 0) & ~is_piece & (num_near >= 2)] = SEAM
    return Segmentation(chroma, labels, dict(pieces))


def _is_fringe(piece: np.ndarray, color: int, candidates: list[tuple[int, np.ndarray]]) -> bool:
    """Whether a piece is only the seam between two objects whose colors mix to its color."""
    if piece.sum() > 0.03 * piece.size or scipy.ndimage.binary_erosion(piece, _NEIGHBORS, iterations=2).any():
        return False
    border = dilate(piece) & ~piece
    touching = [other for other, mask in candidates if other != color and (border & mask).sum() > 1]
    return any(_is_mixture(color, first, second) for i, first in enumerate(touching) for second in touching[:i])


def _is_mixture(color: int, first: int, second: int) -> bool:
    """Whether some mixture of the palette colors `first` and `second` is taken for `color`."""
    share = np.linspace(0.0, 1.0, 9)[:, None]
    mixed = share * _PALETTE[first] + (1 - share) * _PALETTE[second]
    return bool(((mixed @ _PALETTE_HUES.T).argmax(axis=1) == color).any())
