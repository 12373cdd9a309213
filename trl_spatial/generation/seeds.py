"""The random generator of an image, which depends only on which image it is."""

import numpy as np
import torch


def image_generator(seed: int, *path: int) -> torch.Generator:
    """
    Makes the random generator of one image, on the CPU. `path` identifies the image by non-negative numbers, such as
    rollout, group and image. The generator depends on the arguments alone, and generators of adjacent arguments are not
    related.
    """
    # PyTorch's CPU generator uses only 32 bits of a seed, so the arguments are hashed to 32 bits instead of added or packed.
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))
