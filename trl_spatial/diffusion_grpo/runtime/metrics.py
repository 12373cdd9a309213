"""What a training run counts and averages between two logs."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator

from ..advantages import combine_rewards, group_advantages
from ..reward_functions import RewardFunctions, reward_metrics


# Phases that are no part of a step
_OUTSIDE = ("time/evaluate", "time/save")


class TrainingMetrics:
    """
    Collects the metrics of training on one process and merges them over all when they are logged. `totals` are counts
    of this process since the start of training, those that are `counted`, `"num_images"` among them; every log holds them.
    `num_updates` are the updates since the last log.
    """

    def __init__(self, counted: Iterable[str]) -> None:
        self.totals: Counter[str] = Counter(dict.fromkeys(counted, 0))
        self.num_updates = 0
        self._num_images_before = 0
        self._per_image: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._per_rollout: dict[str, list[float]] = defaultdict(list)

    def load_totals(self, totals: Mapping[str, int]) -> None:
        """Continues from the `totals` of a checkpoint."""
        # Checkpoints of 0.1 count passes as "evaluations".
        self.totals.update({name.replace("_evaluations", "_passes"): total for name, total in totals.items()})
        self._num_images_before = self.totals["num_images"]

    def add_per_image(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Adds values of shape `(n,)`, one per image and trained step of this process; the same names on all."""
        for name, values in metrics.items():
            self._per_image[name].append(values.detach().float())

    def add_rollout(
        self, rewards: torch.Tensor, combined: torch.Tensor, functions: RewardFunctions, num_generations: int
    ) -> None:
        """
        Adds the rewards of a rollout, of all processes: `(n, num_funcs)`, NaN where a function gave none, and `(n,)`,
        combined as they are trained on; `n` is `num_prompts * num_generations`.
        """
        # In the functions' own units, and of the images that are trained on, whatever is normalised before training
        summed = combine_rewards(rewards, num_generations, functions.weights)
        metrics = reward_metrics(rewards, summed, functions.names)
        # Groups whose rewards are equal or unknown
        advantages = group_advantages(combined, num_generations).view(-1, num_generations)
        metrics["frac_reward_zero_std"] = (advantages == 0).all(dim=1).float().mean().item()
        for name, value in metrics.items():
            self._per_rollout[name].append(value)

    def collect(self, accelerator: Accelerator, times: Mapping[str, float]) -> dict[str, float]:
        """
        Averages, totals, `images_per_second` and the seconds per update of each phase, of all processes since the last
        call. `times` are the seconds of this process, from [`StepTimer`]. To be called by all processes.
        """
        metrics = {name: sum(values) / len(values) for name, values in self._per_rollout.items()}
        for name, values in sorted(self._per_image.items()):
            of_all = accelerator.gather(torch.cat(values))
            metrics["ratio/mean" if name == "ratio" else name] = of_all.mean().item()
            if name == "ratio":
                metrics["ratio/std"] = of_all.std(correction=0).item()
        totals = torch.tensor(list(self.totals.values()), dtype=torch.float64, device=accelerator.device)
        totals = accelerator.reduce(totals).tolist()
        metrics |= {name: int(total) for name, total in zip(self.totals, totals, strict=True)}

        seconds = times["time/step"] - sum(times.get(name, 0.0) for name in _OUTSIDE)
        num_images = (self.totals["num_images"] - self._num_images_before) * accelerator.num_processes
        if num_images > 0:
            metrics["images_per_second"] = num_images / seconds
        num_updates = max(self.num_updates, 1)
        metrics |= {name: time / num_updates for name, time in times.items() if name not in _OUTSIDE}
        metrics["time/step"] = seconds / num_updates

        self._per_image.clear()
        self._per_rollout.clear()
        self.num_updates, self._num_images_before = 0, self.totals["num_images"]
        return metrics
