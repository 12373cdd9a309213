"""What the rows should give on an H100, from counts of true-size shapes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """Images or pairs per second, and the floating-point operations of one."""

    rate: float
    flops: float


def predict() -> dict[str, Prediction]:
    return {}
