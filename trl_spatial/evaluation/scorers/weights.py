"""Loads weights of scorers that have no class in transformers."""

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...gaussian_reward.weights import DAMAGED, check_finite
from ...hub.errors import call_with_retries, explain_errors
from ...hub.references import Reference


def find_file(reference: Reference, name: str) -> Path:
    """
    A file of a model, downloaded if it is on the Hub.

    Raises:
        `ValueError`: If the folder has no such file.
        `HubError`: If the repository has none, or cannot be reached.
    """
    if not reference.is_local:
        with explain_errors(f"Loading {name} of {reference}"):
            return Path(call_with_retries(hf_hub_download, reference.name, name, revision=reference.revision))
    path = Path(reference.name) / name
    if not path.is_file():
        raise ValueError(f"{reference} has no file {name}.")
    return path


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """
    Reads a file of safetensors.

    Raises:
        `ValueError`: If it is damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {DAMAGED}") from error


def fill(model: nn.Module, weights: dict[str, torch.Tensor], source: object) -> None:
    """
    Gives a model its weights.

    Raises:
        `ValueError`: If one is missing or unknown, has another shape, or is not finite.
    """
    expected = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [name for name in expected.keys() & weights.keys() if expected[name] != weights[name].shape]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(
            f"The weights of {source} are not those of such a model: {shown} are missing, unknown or of another shape."
        )
    check_finite(str(source), weights.items())
    model.load_state_dict(weights, strict=False, assign=True)  # not strict: buffers are computed


def pick_device(device: object) -> torch.device:
    """Returns the given device or, if it is `None`, the accelerator if there is one."""
    if device is not None:
        return torch.device(device)  # type: ignore[call-overload]
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
