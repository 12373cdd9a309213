"""Which prompts a rollout samples."""

import numpy as np


def rollout_prompts(num_rows: int, num_prompts: int, rollout_index: int, *, seed: int) -> list[int]:
    """
    Chooses the prompts of a rollout: a function of its arguments alone, so that a resumed run continues where it was.

    In an epoch every row comes once, in an order of its own. Its last rollout is filled up from further permutations,
    so that all rollouts have the same size and no row is left out.

    Args:
        num_rows (`int`):
            Rows of the dataset.
        num_prompts (`int`):
            Prompts of a rollout, of all processes.
        rollout_index (`int`):
            Number of the rollout since the start of training.
        seed (`int`):
            Seed of the permutations.

    Returns:
        `list[int]`: Indices of rows, of length `num_prompts`.
    """
    epoch, position = divmod(rollout_index, num_rollouts_per_epoch(num_rows, num_prompts))
    start, stop = position * num_prompts, (position + 1) * num_prompts
    permutations = [
        np.random.default_rng([seed, epoch, number]).permutation(num_rows)
        for number in range(start // num_rows, -(-stop // num_rows))
    ]
    offset = start // num_rows * num_rows
    return np.concatenate(permutations)[start - offset : stop - offset].tolist()


def num_rollouts_per_epoch(num_rows: int, num_prompts: int) -> int:
    """Number of rollouts after which every row has come."""
    return -(-num_rows // num_prompts)
