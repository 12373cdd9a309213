"""
Scores images and prompts unlike those that a reward model was trained on:

    python recipes/bench/unlike.py --model runs/demo/reward

On held-out pairs of the demo's scenes, it scores the right image, the wrong one, and images that have nothing to do with the
prompt. It prints the average mean and standard deviation of the scores, with 5 % and 95 % quantiles over the prompts.
"""

import argparse

import numpy as np
from PIL import Image

from trl_spatial import SpatialScore
from trl_spatial.scenes import make_preference_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/reward", help="Checkpoint of a SpatialScore.")
    parser.add_argument("--num_pairs", type=int, default=500)
    args = parser.parse_args()
    pairs = make_preference_dataset(args.num_pairs, split="test", seed=5)
    prompts, chosen = list(pairs["prompt"]), list(pairs["chosen"])
    width, height = chosen[0].size
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (len(prompts), height, width, 3), dtype=np.uint8)
    cases = {
        "the right image": (prompts, chosen),
        "the wrong image of the pair": (prompts, list(pairs["rejected"])),
        "the image of another prompt": (prompts, [*chosen[1:], chosen[0]]),
        "the right image upside down": (prompts, [image.transpose(Image.Transpose.ROTATE_180) for image in chosen]),
        "noise": (prompts, [Image.fromarray(pixels) for pixels in noise]),
        "white": (prompts, [Image.new("RGB", (width, height), "white") for _ in prompts]),
        "a prompt of a photograph": (["a dog to the left of a bench in a park"] * len(prompts), chosen),
    }
    scorer = SpatialScore.from_pretrained(args.model)
    print("| image | mean | std |\n|---|---|---|")
    for name, (texts, images) in cases.items():
        mean, std = scorer.score(texts, images)
        cells = (
            f"{values.mean():.{digits}f} [{np.quantile(values, 0.05):.{digits}f}, {np.quantile(values, 0.95):.{digits}f}]"
            for values, digits in ((mean, 1), (std, 4))
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
