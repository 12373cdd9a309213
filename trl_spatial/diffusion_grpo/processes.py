"""What the processes of a training tell each other when something goes wrong."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


# What `accelerate launch` sets for a way to shard: its name, and why the trainer does not go with it
_SHARDED = {
    "ACCELERATE_USE_FSDP": (
        "FSDP",
        "adapters, their moving average and what is exported are written by one process that would hold a part of them",
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "it shards gradients and optimizer states, which are small for adapters, and scales the loss in its own way",
    ),
}


def check_launch() -> None:
    """
    Refuses what shards the transformer or its optimizer.

    Raises:
        `ValueError`: If `accelerate launch` was told to use FSDP or DeepSpeed.
    """
    for variable, (name, reason) in _SHARDED.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"The launch configuration asks for {name}, under which `DiffusionGRPOTrainer` does not run: {reason}. Use "
                "recipes/accelerate/multi_gpu.yaml, where every GPU holds the frozen weights in bfloat16 and trains LoRA."
            )


@contextmanager
def fail_together(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """
    Context that all processes enter, and that ends on all of them in an error if it does on one.

    Without it the others would wait for a process that is gone, in the next exchange, until the launcher ends them, or, on
    another machine, until `ddp_timeout`. It costs an exchange of one number. Nothing inside may wait for another process.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Connects the processes.
        doing (`str`):
            What happens inside, for the message.

    Raises:
        `RuntimeError`: On the processes that did not fail themselves; it names those that did, and why. The others raise
            what they ran into.
    """
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
                raise RuntimeError(f"{doing} failed on {', '.join(failures)}. Its traceback tells where.")
    if error is not None:
        raise error
