"""Exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .sharding import fill_tensor


class EMA:
    """
    Exponential moving average of a module's trainable parameters, in float32: `weights`, by their names and on their
    devices.

    The decay warms up as in Flow-GRPO: after `n` optimizer steps it is `min(decay, (1 + n) / (10 + n))`, so that the
    random start is soon forgotten. diffusers' `EMAModel` warms up by the number of its own updates, which is `every`
    times slower, and keeps the average in the parameters' dtype, where bfloat16 would lose small changes.

    Pass the module, sharded or not, without the wrappers of distributed training. The average changes at every
    `every`-th of the `num_updates` optimizer steps and keeps a share `decay` of itself, at least 0 and less than 1.
    """

    def __init__(self, module: torch.nn.Module, decay: float, *, every: int = 1):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be at least 0 and less than 1, got {decay}.")
        if every < 1:
            raise ValueError(f"`every` must be at least 1 optimizer step, got {every}.")
        self.decay = decay
        self.every = every
        self.num_updates = 0
        self._parameters = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self.weights = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Counts an optimizer step; every `every`-th one updates the average. Call it after each."""
        self.num_updates += 1
        if self.num_updates % self.every:
            return
        decay = self._current_decay()
        for name, parameter in self._parameters.items():
            self.weights[name].lerp_(parameter.to(torch.float32), 1 - decay)

    def _current_decay(self) -> float:
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """
        Context in which the module computes with the average. The trained values are restored, bit for bit, when it ends.
        Do not train inside.
        """
        # In place: other references to the same memory, such as a sharded weight's part, have to change with it.
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._set_parameters(self.weights)
            yield
        finally:
            self._set_parameters(trained)

    @torch.no_grad()
    def _set_parameters(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns what resuming needs: `weights` and `num_updates`. Decay and interval come from the configuration."""
        return {"weights": self.weights, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, whose tensors are copied."""
        for name, weight in self.weights.items():
            fill_tensor(weight, state["weights"][name])
        self.num_updates = state["num_updates"]
