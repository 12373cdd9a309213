"""Checks of weights: none is missing, all are floating-point numbers, and all are finite."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


DAMAGED = "The checkpoint is damaged or its training diverged: take an earlier one, or save or download it again."


def check_no_missing_keys(name_or_path: str | Path, missing_keys: Iterable[str]) -> None:
    """Raises a `ValueError` that names the weights a checkpoint lacks."""
    missing_keys = sorted(missing_keys)
    if missing_keys:
        shown = ", ".join(missing_keys[:10]) + (", ..." if len(missing_keys) > 10 else "")
        raise ValueError(
            f"The checkpoint {name_or_path} lacks {len(missing_keys)} weights, which would stay random: {shown}. It is "
            "incomplete, or its weights have names that this version of transformers does not translate."
        )


def check_types(files: Iterable[Path]) -> None:
    """
    Checks by their headers that files of weights are complete and hold floating-point numbers: transformers would silently
    cast integers, which are 0 for nearly every weight.

    Raises:
        `ValueError`: If a file is cut off or damaged, or holds another type.
    """
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                types = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}). {DAMAGED}") from error
        wrong = [f"{name} ({dtype})" for name, dtype in types.items() if not dtype.startswith(("F", "BF"))]
        if wrong:
            raise ValueError(f"{file} holds {len(wrong)} weights that are not floating-point: {wrong[0]}. {DAMAGED}")


def check_finite(name_or_path: str | Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises a `ValueError` that names the first weight with a NaN or an infinity. Quantized weights are not checked."""
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta and tensor.numel():
            # not `isfinite().all()`, which would allocate as many bytes as the tensor has elements
            extremes = [value.item() for value in torch.aminmax(tensor.detach())]
            if not all(map(math.isfinite, extremes)):
                raise ValueError(
                    f"{name_or_path} has weights that are not finite: {name} ranges from {extremes[0]} to {extremes[1]}. "
                    f"{DAMAGED}"
                )
