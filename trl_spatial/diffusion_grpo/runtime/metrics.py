"""Counts and averages of a training run, between two logs."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ...statistics import rank_correlation
from ..advantages import combine_rewards, group_advantages
from ..reward_functions import RewardFunctions, reward_metrics


# Phases that do not count as part of a step
_OUTSIDE = ("time/evaluate", "time/save")
# Longest side of the images whose pixels are compared
_COMPARED_SIZE = 32


class TrainingMetrics:
    """
    Collects the training metrics of one process and merges those of all processes when they are logged. `totals` holds this
    process's counts since the start of training, under the names in `counted`, which include `"num_images"`; every log has
    them. `num_updates` is the number of updates since the last log.
    """

    def __init__(self, counted: Iterable[str]) -> None:
        self.totals: Counter[str] = Counter(dict.fromkeys(counted, 0))
        self.num_updates = 0
        self._totals_before = self.totals.copy()
        self._per_image: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._per_rollout: dict[str, list[float]] = defaultdict(list)

    def load_totals(self, totals: Mapping[str, int]) -> None:
        """Continues from the `totals` of a checkpoint."""
        # Checkpoints of 0.1 count passes as "evaluations".
        self.totals.update({name.replace("_evaluations", "_passes"): total for name, total in totals.items()})
        self._totals_before = self.totals.copy()

    def add_per_image(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Adds values of shape `(n,)`, one per image and trained step of this process; the same names on all."""
        for name, values in metrics.items():
            self._per_image[name].append(values.detach().float())

    def add_rollout(
        self, rewards: torch.Tensor, combined: torch.Tensor, functions: RewardFunctions, num_generations: int
    ) -> None:
        """
        Adds the rewards of a rollout from all processes: `(n, num_funcs)`, NaN where a function gave none, and `(n,)`,
        combined for training; `n` is `num_prompts * num_generations`.
        """
        # In the functions' own units, for images that can be trained on, whatever is normalized for training
        summed = combine_rewards(rewards, num_generations, functions.weights)
        metrics = reward_metrics(rewards, summed, functions.names)
        # Groups whose rewards are equal or unknown
        advantages = group_advantages(combined, num_generations).view(-1, num_generations)
        metrics["frac_reward_zero_std"] = (advantages == 0).all(dim=1).float().mean().item()
        for name, value in metrics.items():
            self._per_rollout[name].append(value)

    def add_scouts(self, scout_rewards: torch.Tensor, combined: torch.Tensor, num_drawn: int) -> None:
        """
        Adds the combined rewards of a rollout's images and of their scouts, both `(num_prompts * num_drawn,)`, from all
        processes, to log how well scouts predict the order of a group. Groups in which either has no order are left out.
        """
        correlations = [
            rank_correlation(scouts[known], finals[known])
            for scouts, finals in zip(
                scout_rewards.view(-1, num_drawn).numpy(), combined.view(-1, num_drawn).numpy(), strict=True
            )
            for known in [~(np.isnan(scouts) | np.isnan(finals))]
        ]
        defined = [correlation for correlation in correlations if not math.isnan(correlation)]
        if defined:
            self._per_rollout["scout_rank_correlation"].append(sum(defined) / len(defined))

    def collect(self, accelerator: Accelerator, times: Mapping[str, float]) -> dict[str, float]:
        """
        Returns averages, totals, `images_per_second` and `passes_per_update` of all processes since the last call, the passes per
        trained image since the start, and the seconds per update of each phase. `times` are the seconds of this process, from
        [`StepTimer`]. All processes have to call this.
        """
        metrics = {name: sum(values) / len(values) for name, values in self._per_rollout.items()}
        for name, values in sorted(self._per_image.items()):
            of_all = accelerator.gather(torch.cat(values))
            metrics["ratio/mean" if name == "ratio" else name] = of_all.mean().item()
            if name == "ratio":
                metrics["ratio/std"] = of_all.std(correction=0).item()
        new, totals = self._reduced(accelerator)
        metrics |= totals
        num_updates = max(self.num_updates, 1)
        metrics["passes_per_update"] = _num_passes(new) / num_updates
        if totals.get("num_trained_images"):
            metrics["passes_per_trained_image"] = _num_passes(totals) / totals["num_trained_images"]

        seconds = times["time/step"] - sum(times.get(name, 0.0) for name in _OUTSIDE)
        if new["num_images"] > 0:
            metrics["images_per_second"] = new["num_images"] / seconds
        metrics |= {name: time / num_updates for name, time in times.items() if name not in _OUTSIDE}
        metrics["time/step"] = seconds / num_updates

        self._per_image.clear()
        self._per_rollout.clear()
        self.num_updates, self._totals_before = 0, self.totals.copy()
        return metrics

    def _reduced(self, accelerator: Accelerator) -> tuple[dict[str, int], dict[str, int]]:
        """Counts of all processes since the last log, and since the start."""
        totals = list(self.totals.values())
        new = [total - self._totals_before[name] for name, total in self.totals.items()]
        counts = torch.tensor([new, totals], dtype=torch.float64, device=accelerator.device)
        new, totals = accelerator.reduce(counts).long().tolist()
        return dict(zip(self.totals, new, strict=True)), dict(zip(self.totals, totals, strict=True))


def _num_passes(counts: Mapping[str, int]) -> int:
    return sum(count for name, count in counts.items() if name.endswith("_passes"))


def group_diversity(images: list[Image.Image], num_generations: int) -> torch.Tensor:
    """
    Measures how much the images of a prompt differ: the root mean square pixel difference, from 0 to 1, over all pairs of a group,
    whose images follow each other. Images are compared at a small size, which is fast and ignores fine grain.

    Returns:
        `torch.Tensor` of shape `(num_prompts,)`: float32.
    """
    width, height = images[0].size
    size = (min(width, _COMPARED_SIZE), min(height, _COMPARED_SIZE))
    small = [np.asarray(image.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255 for image in images]
    groups = torch.from_numpy(np.stack(small)).flatten(1).unflatten(0, (-1, num_generations))
    # The mean square of a difference is twice the variance
    return (2 * groups.var(dim=1)).mean(dim=1).sqrt()  # (num_prompts,)
