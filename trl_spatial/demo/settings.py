"""Settings of the demo."""

from dataclasses import dataclass, field


# Defaults of the full demo and of `--quick`
_FULL = {
    "num_train_pairs": 8000,
    "num_test_pairs": 3000,
    "reward_steps": 250,
    "grpo_steps": 200,
    "num_prompts": 256,
}
_QUICK = {
    "num_train_pairs": 1600,
    "num_test_pairs": 300,
    "reward_steps": 50,
    "grpo_steps": 60,
    "num_prompts": 48,
}


@dataclass
class DemoSettings:
    """
    Settings of the demo.

    Args:
        output_dir (`str`, *optional*, defaults to `"runs/demo"`):
            Folder of the models, the results and the report. An interrupted run in it is continued.
        quick (`bool`, *optional*, defaults to `False`):
            Whether to use smaller defaults: faster, with less reliable results.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairs, the prompts, and both trainings.
        num_train_pairs (`int`, *optional*, defaults to `8000`, quick `1600`):
            Number of preference pairs to train the reward model on; each is used in both directions.
        num_test_pairs (`int`, *optional*, defaults to `3000`, quick `300`):
            Number of held-out pairs to measure the reward model on.
        reward_steps (`int`, *optional*, defaults to `250`, quick `50`):
            Number of updates of the reward model.
        grpo_steps (`int`, *optional*, defaults to `200`, quick `60`):
            Number of updates of the generator.
        num_prompts (`int`, *optional*, defaults to `256`, quick `48`):
            Number of held-out prompts on which the generator is measured before and after, with 4 images each.
    """

    output_dir: str = field(
        default="runs/demo",
        metadata={"help": "Folder of the models, the results and the report. An interrupted run in it is continued."},
    )
    quick: bool = field(
        default=False, metadata={"help": "Use smaller defaults: three minutes, with less reliable results."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the pairs, the prompts, and both trainings."})
    num_train_pairs: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of pairs to train on. If `None`, 8000, quick 1600."}
    )
    num_test_pairs: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of held-out pairs to measure on. If `None`, 3000, quick 300."}
    )
    reward_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of updates of the reward model. If `None`, 250, quick 50."}
    )
    grpo_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of updates of the generator. If `None`, 200, quick 60."}
    )
    num_prompts: int = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Number of held-out prompts, with 4 images each, to measure on. If `None`, 256, quick 48."},
    )

    def __post_init__(self):
        for name, number in (_QUICK if self.quick else _FULL).items():
            if getattr(self, name) is None:
                setattr(self, name, number)
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. Use a positive number.")
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}. Use 0 or a positive number.")
