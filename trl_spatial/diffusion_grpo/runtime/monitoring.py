"""Warnings about runs that go wrong, each with its fix, and a timer of a step's phases."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...statistics import paired_change


# With fewer groups than this, an update is mostly noise, and the policy often collapses.
MIN_GROUPS_PER_UPDATE = 8
# Evaluations over which the trained and the held-out rewards are compared.
NUM_COMPARED_EVALUATIONS = 3
# A reward function that leaves out more of a rollout's images than this is worth a warning.
MAX_FRAC_NONE = 0.1


def setup_warnings(
    *,
    dynamics: str,
    noise_level: float,
    trains_first_step: bool,
    epsilon: float,
    num_latent_elements: int,
    num_updates_per_rollout: int,
    is_ratio_corrected: bool,
    num_groups_per_update: float,
) -> list[str]:
    """
    Warns about settings that are allowed but known to hurt, each with its value and the fix. `trains_first_step`
    says whether the first denoising step is ever stochastic, and `is_ratio_corrected` whether the ratio is normalized
    or a KL mask replaces the clip. With one update per rollout, the ratio is 1 and nothing is clipped.
    """
    warnings = []
    if dynamics == "flow_sde" and trains_first_step and noise_level >= math.sqrt(2):
        warnings.append(
            f"`noise_level` is {noise_level}: from the square root of 2 up, the first step of Flow-SDE erases or flips the "
            "latents. Lower it (FLUX uses 0.9), or exclude the first step with `sde_window_size` and "
            "`sde_window_range`, starting at 1."
        )
    # Above 2 / D the mean of log r, -delta²/2, is larger than its spread, delta / sqrt(D).
    limit = 2 / num_latent_elements
    if epsilon > limit and num_updates_per_rollout > 1 and not is_ratio_corrected:
        warnings.append(
            f"`epsilon` is {epsilon:g}, more than 2 / {num_latent_elements} (latent elements) = {limit:.2g}: with "
            f"{num_updates_per_rollout} updates per rollout, ratios fall below 1 on average and the upper clip almost never "
            "triggers. Set `ratio_norm=True`, use `kl_mask`, or make one update per rollout."
        )
    return warnings + few_groups_warnings(num_groups_per_update)


def few_groups_warnings(num_groups_per_update: float) -> list[str]:
    """Warns about updates with few groups, whatever the loss."""
    if num_groups_per_update >= MIN_GROUPS_PER_UPDATE:
        return []
    return [
        f"An update sees {num_groups_per_update:g} groups, fewer than {MIN_GROUPS_PER_UPDATE}: training often collapses "
        "with so few prompts. Raise `gradient_accumulation_steps`, `per_device_train_batch_size` or the number of "
        "processes."
    ]


class RewardsMonitor:
    """
    Warns about a rollout from which nothing can be learned, and when a reward function starts to leave out images: when
    more than a tenth of a rollout's images lack its reward, and again only after the share has been below that.
    """

    def __init__(self) -> None:
        self._missing: set[str] = set()

    def update(self, names: list[str], rewards: torch.Tensor, combined: torch.Tensor) -> list[str]:
        """
        Returns warnings about a rollout, given the rewards of each function over all processes, `(n, num_funcs)`, NaN where
        there is none, and their weighted sums, `(n,)`, from [`~advantages.combine_rewards`].
        """
        warnings = []
        for name, column in zip(names, rewards.unbind(dim=1), strict=True):
            num_none = int(column.isnan().sum())
            if num_none <= MAX_FRAC_NONE * len(column):
                self._missing.discard(name)
            elif name not in self._missing:
                self._missing.add(name)
                warnings.append(
                    f"The reward function `{name}` gave no reward to {num_none} of the {len(column)} images of this rollout, "
                    f"more than {MAX_FRAC_NONE:.0%}. Images without a reward that others in their group have are not trained "
                    f"on. Look for errors from the function above; `rewards/{name}/frac_none` shows whether this persists."
                )
        known = combined[~combined.isnan()]
        if len(known) == 0:
            warnings.append(
                f"None of the {len(combined)} images of this rollout has all the rewards that others in its group have: there "
                "is nothing to learn. Check that the reward functions can score this kind of prompt."
            )
        elif known.min() == known.max() and len(known) > 1:
            warnings.append(
                f"All {len(known)} images of this rollout have the reward {known[0].item():g}: there is nothing to learn. If "
                "this persists, use a finer reward, easier or harder prompts, or a higher `noise_level` for more diverse "
                "images."
            )
        return warnings


class HackingMonitor:
    """
    Notices reward hacking: the trained reward rises from evaluation to evaluation while one that is not trained on
    falls.

    The same prompts and seeds are evaluated each time, so images are compared in pairs: over the last three
    evaluations, 0 must be outside the 95 % intervals of both changes, which resample whole prompts. Evaluations before a
    resume are not known, and an evaluation with another number of images starts over.
    """

    def __init__(self) -> None:
        self._history: list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]] = []

    def update(
        self, step: int, trained: torch.Tensor, held_out: Mapping[str, torch.Tensor], prompts: Sequence[str]
    ) -> list[str]:
        """
        Adds an evaluation after `step` updates: the trained reward, `(n,)`, held-out rewards of the same images by name, NaN
        where there is none, and the images' `prompts`, in the same order in every evaluation. Returns a warning for each
        held-out reward that falls while the trained one rises.
        """
        # A step that is evaluated twice counts once.
        history = [entry for entry in self._history if entry[0] != step and len(entry[1]) == len(trained)]
        history.append((step, trained.cpu(), {name: values.cpu() for name, values in held_out.items()}))
        self._history = history[-NUM_COMPARED_EVALUATIONS:]
        first_step, first_trained, first_held_out = self._history[0]
        if len(self._history) < NUM_COMPARED_EVALUATIONS:
            return []
        rise = paired_change(first_trained, trained.cpu(), prompts)
        if rise is None or rise.low <= 0:
            return []
        warnings = []
        for name, values in held_out.items():
            change = paired_change(first_held_out[name], values.cpu(), prompts)
            if change is not None and change.high < 0:
                warnings.append(
                    f"Since step {first_step} the trained reward rose by {rise.estimate:.3g} while the held-out reward `{name}` "
                    f"fell by {-change.estimate:.3g}: the policy may be exploiting the reward. Look at the image grids; go back to an "
                    "earlier checkpoint, raise `beta`, lower `learning_rate`, or add the held-out reward to `reward_funcs`."
                )
        return warnings


class StepTimer:
    """
    Splits the time of a step into phases. A phase within another one is not counted twice: the outer one is paused
    meanwhile.

    `synchronize` waits for the accelerator at the start and the end of every phase, so that work is counted in the phase
    that launched it. If `None`, it is [`torch.accelerator.synchronize`] if there is an accelerator.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None):
        if synchronize is None and torch.accelerator.is_available():
            synchronize = torch.accelerator.synchronize
        self._synchronize = synchronize
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._step_start = self._last_switch = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose time goes to `time/<name>`."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._last_switch
        self._last_switch = now

    def restart(self) -> None:
        """Forgets what was measured, such as the time of an evaluation between two steps."""
        self._seconds.clear()
        self._step_start = self._last_switch = time.perf_counter()

    def collect(self) -> dict[str, float]:
        """
        Ends the step and starts the next. Returns the seconds of each phase as `time/<name>`, of the whole step as
        `time/step`, and of what belongs to no phase as `time/rest`.
        """
        self._switch()
        total = self._last_switch - self._step_start
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        rest = total - sum(times.values())
        self.restart()
        return {**times, "time/rest": rest, "time/step": total}
