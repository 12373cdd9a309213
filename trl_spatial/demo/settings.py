"""Settings of the demo."""

from dataclasses import dataclass, field
from typing import Any


# Defaults of the full demo and of `--quick`
_SIZES = {
    "num_train_pairs": (8000, 1600),
    "num_test_pairs": (3000, 300),
    "reward_steps": (250, 50),
    "grpo_steps": (100, 60),
    "num_prompts": (256, 48),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DemoSettings:
    """Settings of the demo; the `help` of each describes it."""

    output_dir: str = _option(
        "runs/demo", "Folder for the models, the results and the report. An interrupted run in it is continued."
    )
    quick: bool = _option(False, "Use smaller defaults: two minutes, with less reliable results.")
    seed: int = _option(0, "Seed for the pairs, the prompts and both training runs.")
    num_train_pairs: int = _option(
        None, "Number of pairs to train the reward model on, each in both directions. If `None`, 8000, quick 1600."
    )
    num_test_pairs: int = _option(None, "Number of held-out pairs to measure it on. If `None`, 3000, quick 300.")
    reward_steps: int = _option(None, "Number of updates of the reward model. If `None`, 250, quick 50.")
    grpo_steps: int = _option(None, "Number of updates of the generator. If `None`, 100, quick 60.")
    all_steps: bool = _option(
        False,
        "Train on all denoising steps but the last, as the paper does, instead of a window of two in the first half.",
    )
    num_prompts: int = _option(
        None, "Number of held-out prompts, with 4 images each, to measure the generator on. If `None`, 256, quick 48."
    )

    def __post_init__(self):
        for name, defaults in _SIZES.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[self.quick])
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. Use a positive number.")
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}. Use 0 or a positive number.")
