"""Timing on a device."""

import time
from collections.abc import Callable
from typing import Any

import torch


def clock(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Returns the mean seconds of a call, after one that warms up."""
    function()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def matmul_ceiling(device: torch.device) -> float:
    """Measures the floating-point operations per second of a product of two square bfloat16 matrices."""
    size = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / clock(lambda: matrix @ matrix, device, repeats=10)


def copy_bandwidth(device: torch.device) -> float:
    """Measures the bytes per second that a copy on the device reads and writes."""
    values = torch.empty(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    return 2 * len(values) / clock(values.clone, device, repeats=10)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
