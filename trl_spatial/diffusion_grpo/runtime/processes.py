"""Errors of one process of a training, raised in all of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def check_launch() -> None:
    """
    Refuses ways to share out the transformer that the trainer does not support: DeepSpeed, and FSDP of version 1.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "The launch configuration asks for DeepSpeed, under which diffusion models are not trained here: its checkpoints "
            "hold the frozen weights, and in bfloat16 it trains adapters that are rounded to it. Use recipes/accelerate/fsdp2.yaml, "
            "which shards weights, gradients and optimizer states, or recipes/accelerate/multi_gpu.yaml, where every GPU "
            "holds the frozen weights."
        )
    if is_fsdp_launch() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "The launch configuration asks for FSDP of version 1, under which diffusion models are not trained here: it packs "
            "the parameters of a layer into one. Set `fsdp_version: 2`, as in recipes/accelerate/fsdp2.yaml."
        )


def is_fsdp_launch() -> bool:
    """Whether the launch configuration asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@contextmanager
def fail_together(accelerator: Accelerator, doing: str, *, is_collective: bool = False) -> Iterator[None]:
    """
    Context that all processes enter, and that ends on all of them in an error if it does on one: the others raise a
    `RuntimeError` that names those that failed, and why. Its message says what happened inside, `doing`.

    Without it the others would wait for a process that is gone, in the next exchange, until the launcher ends them,
    or, on another machine, until `ddp_timeout`. It costs an exchange of one number.

    What is inside may wait for other processes only if `is_collective`. Then an error ends this process alone, and the
    launcher the others, as they could not hear of it.
    """
    if is_collective:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # raised again below, when the others know
        error = raised
    if accelerator.num_processes > 1:
        num_failed = accelerator.reduce(torch.tensor(int(error is not None), device=accelerator.device)).item()
        if num_failed > 0:
            reasons = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            if error is None:
                failures = [f"process {rank} ({reason})" for rank, reason in enumerate(reasons) if reason is not None]
                raise RuntimeError(f"{doing} failed on {', '.join(failures)}. See its traceback for the place.")
    if error is not None:
        raise error
