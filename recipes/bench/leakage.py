"""Can the winner of a pair be guessed without comparing text and image?

    python recipes/bench/leakage.py

Trains rewards that see only half of the data, on pairs with a reward model's loss: the image alone (a linear model and a small
convolutional network) or the text alone (words and pairs of words; the prompt has to win over the perturbed prompt). Each must stay
at chance on held-out pairs. To show that they would find a leak, they are also trained on the same pairs with one planted: winners
a little brighter, winners enlarged by 6 %, losing texts always worded the same way.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from trl_spatial.scenes import describe_scene, make_preference_dataset, parse_description
from trl_spatial.statistics import accuracy_interval


MAX_DEVIATION = 0.02  # of the accuracy from chance; above it, the script fails
SIDE = 32  # width and height of the images that the classifiers see


def brighten(image: Image.Image) -> Image.Image:
    return image.point([min(value + 8, 255) for value in range(256)] * 3)


def enlarge(image: Image.Image) -> Image.Image:
    margin = 0.03 * image.width
    return image.resize(
        image.size, Image.Resampling.BICUBIC, (margin, margin, image.width - margin, image.height - margin)
    )


def reword(text: str) -> str:
    return describe_scene(parse_description(text), seed=0)


def read_images(dataset: Dataset, change: Callable[[Image.Image], Image.Image] | None) -> torch.Tensor:
    """Returns pixels `(num_pairs, 2, 3, SIDE, SIDE)` from -1 to 1, winner first; `change` plants a leak in the winners."""
    pairs = []
    for row in tqdm(dataset, desc="Reading images", unit="pair"):
        chosen = change(row["chosen"]) if change else row["chosen"]
        pairs.append(
            [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in (chosen, row["rejected"])]
        )
    return torch.from_numpy(np.array(pairs)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


def read_texts(datasets: list[Dataset], change: Callable[[str], str] | None) -> list[torch.Tensor]:
    """
    Returns counts of words and pairs of words `(num_pairs, 2, num_terms)` for each dataset, prompt first; `change` plants a leak in
    the perturbed prompts. The terms are those in at least 5 texts of the first dataset.
    """

    def terms(text: str) -> Counter:
        words = re.findall(r"[a-z]+", text.lower())
        return Counter(words) + Counter(itertools.pairwise(words))

    counts = []
    for dataset in datasets:
        losers = dataset["perturbed_prompt"]
        texts = zip(dataset["prompt"], map(change, losers) if change else losers, strict=True)
        counts.append([(terms(winner), terms(loser)) for winner, loser in texts])
    frequency = Counter(term for pair in counts[0] for text in pair for term in text)
    index = {term: i for i, term in enumerate(sorted((t for t, n in frequency.items() if n >= 5), key=str))}
    features = []
    for pairs in counts:
        feature = torch.zeros(len(pairs), 2, len(index))
        for i, pair in enumerate(pairs):
            for j, text in enumerate(pair):
                for term in text.keys() & index.keys():
                    feature[i, j, index[term]] = text[term]
        features.append(feature)
    return features


class ImageNetwork(nn.Sequential):
    """A small convolutional network: images `(batch, 3, SIDE, SIDE)` → rewards `(batch, 1)`."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 1)),
        )


def train(model: nn.Module, pairs: torch.Tensor, num_epochs: int, learning_rate: float, seed: int) -> nn.Module:
    """Trains with the Bradley-Terry loss on pairs `(num_pairs, 2, ...)`, winner first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(num_epochs), desc=f"Training {type(model).__name__}", unit="epoch"):
        for batch in torch.randperm(len(pairs), generator=generator).split(64):
            winners, losers = model(pairs[batch].flatten(0, 1)).view(-1, 2).unbind(1)
            loss = -F.logsigmoid(winners - losers).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, pairs: torch.Tensor) -> dict[str, float]:
    """Share of pairs whose winner gets the higher reward, counting a tie as half, with its 95 % interval."""
    margins = torch.cat(
        [model(part.flatten(0, 1)).view(-1, 2) @ torch.tensor([1.0, -1.0]) for part in pairs.split(500)]
    )
    interval = accuracy_interval((0.5 + 0.5 * margins.sign()).numpy())
    return {"accuracy": interval.estimate, "low": interval.low, "high": interval.high, "n": len(pairs)}


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Accuracy of every classifier on held-out pairs, without a leak and with each."""
    sets = [
        make_preference_dataset(
            number, split=split, seed=args.seed, image_size=args.image_size, num_proc=args.num_proc
        )
        for number, split in ((args.num_train, "train"), (args.num_test, "test"))
    ]
    results = {}
    image_leaks: dict[str, Callable | None] = {"none": None, "brighter": brighten, "larger": enlarge}
    for leak, change in image_leaks.items():
        train_images, test_images = (read_images(dataset, change) for dataset in sets)
        for name, make, num_epochs, rate in (
            ("image, linear", lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(1)), 5, 1e-4),
            ("image, network", ImageNetwork, 6, 1e-3),
        ):
            torch.manual_seed(args.seed)
            model = train(make(), train_images, num_epochs, rate, args.seed)
            results[f"{name}, leak: {leak}"] = accuracy(model, test_images)
    text_leaks: dict[str, Callable | None] = {"none": None, "one wording": reword}
    for leak, change in text_leaks.items():
        train_texts, test_texts = read_texts(sets, change)
        torch.manual_seed(args.seed)
        model = train(nn.Sequential(nn.LazyLinear(1)), train_texts, 10, 1e-2, args.seed)
        results[f"text, linear, leak: {leak}"] = accuracy(model, test_texts)
    return results


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_train", type=int, default=4000, help="pairs to train on")
    parser.add_argument("--num_test", type=int, default=6000, help="pairs to test on, of other objects")
    parser.add_argument("--image_size", type=int, default=64, help="width and height, in pixels")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    results = measure(args)
    for name, result in results.items():
        print(f"{name:<32}{result['accuracy']:.3f}  [{result['low']:.3f}, {result['high']:.3f}]  n={result['n']}")
    print(
        json.dumps(
            vars(args)
            | {"results": results, "seconds": round(time.perf_counter() - start)}
            | {"processor_seconds": round(time.process_time())}
        )
    )
    return results


if __name__ == "__main__":
    leaks = [name for name, r in main().items() if "none" in name and abs(r["accuracy"] - 0.5) > MAX_DEVIATION]
    sys.exit(f"More than {MAX_DEVIATION} from chance: {leaks}" if leaks else 0)
