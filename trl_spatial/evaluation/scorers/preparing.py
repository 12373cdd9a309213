"""Preprocesses images the way older scorers were trained."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images


def shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    """Returns width and height scaled so that the shorter one is `side`; the longer one is rounded down."""
    short, long = min(width, height), max(width, height)
    other = int(side * long / short)
    return (side, other) if width <= height else (other, side)


def crop_center(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Returns the central square of size `side` of images `(..., height, width)`."""
    height, width = pixels.shape[-2:]
    # like torchvision, Python rounds halves to even
    top, left = round((height - side) / 2), round((width - side) / 2)
    return pixels[..., top : top + side, left : left + side]


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Subtracts the mean of each of three channels and divides by its deviation, `(..., 3, height, width)`."""
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image in RGB as a tensor from 0 to 1, `(3, height, width)`."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def prepare_by_pillow(image: Image.Image, side: int) -> torch.Tensor:
    """Resizes with Pillow, which rounds to whole gray levels, then cuts out the middle and normalizes: `(3, side, side)`."""
    resized = image.resize(shorter_side(*image.size, side), Image.Resampling.BICUBIC)
    return normalize(crop_center(to_tensor(resized), side))


def prepare_by_torch(image: Image.Image, side: int) -> torch.Tensor:
    """Does the same in floating point, which overshoots the range from 0 to 1 at edges: `(3, side, side)`."""
    width, height = shorter_side(*image.size, side)
    pixels = to_tensor(image)
    if (width, height) != image.size:
        pixels = F.interpolate(
            pixels[None], size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )[0]
    return normalize(crop_center(pixels, side))
