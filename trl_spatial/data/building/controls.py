"""Controls for shortcuts in a preference dataset: can the winner be guessed without comparing image and prompt?"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from ...preferences.images import load_image
from ...statistics import Interval, share_interval


SIDE = 16  # width and height of the images that the classifier sees
NUM_WORDS = 2000
MAX_ROWS = 5000  # per split


def guess_without_prompt(rows: Dataset) -> float:
    """
    The largest share of the pairs that a scorer which never sees a prompt can get right.

    Args:
        rows ([`~datasets.Dataset`]):
            Preference pairs, with the columns `chosen_image` and `rejected_image` that name the images.

    Returns:
        `float`: 0.5 if every pair of images occurs in both directions.
    """
    counts = Counter(zip(rows["chosen_image"], rows["rejected_image"], strict=True))
    pairs = {tuple(sorted(pair)) for pair in counts}
    return sum(max(counts[pair], counts[pair[::-1]]) for pair in pairs) / len(rows)


def guess_from_images(train: Dataset, test: Dataset) -> Interval:
    """
    Accuracy on `test` of a linear classifier that sees both images of a pair, 16 pixels wide, and no prompt.

    Args:
        train ([`~datasets.Dataset`]), test ([`~datasets.Dataset`]):
            Preference pairs; the first 5,000 of each are used.

    Returns:
        `Interval`: with a 95 % interval that resamples whole pairs of images. Chance is 0.5.
    """
    return _guess(train, test, _image_features)


def guess_from_texts(train: Dataset, test: Dataset) -> Interval:
    """
    Accuracy on `test` of a linear classifier that sees the words of the prompt and of the perturbed prompt and tells which
    is the prompt.

    Args:
        train ([`~datasets.Dataset`]), test ([`~datasets.Dataset`]):
            As in [`guess_from_images`].
    """
    words = Counter(word for text in train["prompt"][:MAX_ROWS] for word in _words(text))
    index = {word: number for number, (word, _) in enumerate(words.most_common(NUM_WORDS))}

    def features(rows: Dataset) -> torch.Tensor:
        return _counts(rows["prompt"], index) - _counts(rows["perturbed_prompt"], index)

    return _guess(train, test, features)


def _guess(train: Dataset, test: Dataset, features: Callable[[Dataset], torch.Tensor]) -> Interval:
    """
    Fits a logistic regression on `train` and returns its accuracy on `test`. `features` are differences, right minus
    wrong, and there is no bias, so swapping the two sides of a pair flips the prediction.
    """
    train, test = (rows.select(range(min(len(rows), MAX_ROWS))) for rows in (train, test))
    inputs, held_out = features(train), features(test)
    scale = inputs.square().mean(dim=0).sqrt().clamp(min=1e-3)
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-(inputs / scale) @ weights).mean() + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    margins = ((held_out / scale) @ weights).detach().numpy()
    right = np.where(np.abs(margins) < 1e-6, 0.5, margins > 0)  # a tie counts half
    keys = np.array(
        ["|".join(sorted(pair)) for pair in zip(test["chosen_image"], test["rejected_image"], strict=True)]
    )
    return share_interval(right, keys)


def _image_features(rows: Dataset) -> torch.Tensor:
    differences = [_pixels(row["chosen"]) - _pixels(row["rejected"]) for row in rows]
    return torch.from_numpy(np.stack(differences))


def _pixels(image: Any) -> np.ndarray:
    small = load_image(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255


def _words(text: str) -> list[str]:
    words = text.lower().split()
    return words + [" ".join(pair) for pair in pairwise(words)]


def _counts(texts: Sequence[str], index: dict[str, int]) -> torch.Tensor:
    counts = torch.zeros(len(texts), len(index))
    for row, text in enumerate(texts):
        for word in _words(text):
            if word in index:
                counts[row, index[word]] += 1
    return counts
