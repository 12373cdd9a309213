"""A trainer that records the time and peak memory of each phase of an update."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from trl_spatial import DiffusionGRPOTrainer


GIB = 2**30


class PhaseTrainer(DiffusionGRPOTrainer):
    """
    A [`DiffusionGRPOTrainer`] that treats decoding, the reference pass and the optimizer step as separate phases.

    `peaks` holds each phase's peak bytes on the accelerator so far; on the CPU it is empty.

    Args:
        *args, **kwargs:
            Arguments of the parent.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.peaks: dict[str, int] = defaultdict(int)
        self._timer._synchronize = self._end_of_phase
        self.policy.decode_latents = self._as_phase("decode", self.policy.decode_latents)
        self.add_callback(_OptimizerPhase(self._timer))

    def _end_of_phase(self) -> None:
        if self.args.device.type != "cuda":
            return
        torch.cuda.synchronize(self.args.device)
        phase = self._timer._running[-1] if self._timer._running else "rest"
        self.peaks[phase] = max(self.peaks[phase], torch.cuda.max_memory_allocated(self.args.device))
        torch.cuda.reset_peak_memory_stats(self.args.device)

    def _as_phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._timer.phase(name):
                return function(*args, **kwargs)

        return run

    def _score_reference(self, inputs: Any) -> Any:
        with self._timer.phase("reference"):
            return super()._score_reference(inputs)

    def report(self, num_warm_up: int) -> dict[str, Any]:
        """Returns images per second and seconds per phase, without the first `num_warm_up` updates, and peaks in GiB."""
        logs = [entry for entry in self.state.log_history if "time/step" in entry][num_warm_up:]
        names = sorted({name for entry in logs for name in entry if name.startswith("time/")})
        seconds = {
            name.removeprefix("time/"): sum(entry.get(name, 0.0) for entry in logs) / len(logs) for name in names
        }
        num_images = self.args.num_prompts_per_device * self.args.num_generations / self.args.num_updates_per_rollout
        report: dict[str, Any] = {"images_per_second": num_images / seconds["step"], "seconds": seconds}
        if self.peaks:
            report["phases_gib"] = {name: peak / GIB for name, peak in self.peaks.items()}
            report["peak_gib"] = max(report["phases_gib"].values())
        return report


class _OptimizerPhase(TrainerCallback):
    def __init__(self, timer: Any):
        self.timer = timer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.phase = self.timer.phase("optimizer")
        self.phase.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.phase.__exit__(None, None, None)
