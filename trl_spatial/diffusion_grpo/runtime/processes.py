"""Launch configurations that the diffusion trainers support."""

import os


def check_launch() -> None:
    """
    Refuses ways to shard training that the trainer does not support: DeepSpeed and version 1 of FSDP.
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
    """Returns whether the launch configuration asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
