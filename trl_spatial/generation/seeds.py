"""The random generator of an image: it depends on which image it is, and on nothing else."""

import numpy as np
import torch


def image_generator(seed: int, *path: int) -> torch.Generator:
    """
    Makes the random generator of one image, on the CPU. `path` says which image it is, in numbers that are not
    negative, such as rollout, group and image. It depends on the arguments alone, and generators of neighbouring
    arguments are not related.
    """
    # PyTorch's CPU generator uses 32 bits of a seed, so consecutive integers will do as little as their sums would.
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))
