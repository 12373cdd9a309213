"""The random generator of an image: it depends on which image it is, and on nothing else."""

import numpy as np
import torch


def image_generator(seed: int, *path: int) -> torch.Generator:
    """
    Makes the random generator of one image.

    Args:
        seed (`int`):
            Seed of the run, not negative.
        *path (`int`):
            Which image it is: numbers that are not negative, such as rollout, group and image.

    Returns:
        `torch.Generator`: On the CPU. It depends on the arguments alone, and generators of neighbouring arguments are
        not related.
    """
    # PyTorch's CPU generator uses 32 bits of a seed, so consecutive integers will do as little as their sums would.
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))
