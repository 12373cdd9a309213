"""
Tensors of a transformer whose weights are shared out among processes (FSDP2): `DTensor`s, of which each process holds a part.
They are put together, layer by layer, for each forward and backward pass.
"""

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the weights of a module are shared out."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather_tensors(tensors: Mapping[str, torch.Tensor], *, is_writer: bool = True) -> dict[str, torch.Tensor]:
    """
    Copies tensors to the CPU, whole. If they are sharded all processes have to call this.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Tensors of any shape and dtype.
        is_writer (`bool`, *optional*, defaults to `True`):
            Whether this process gets the copies. They may not fit beside each other on a GPU, nor several times on the CPU.

    Returns:
        `dict[str, torch.Tensor]`: contiguous copies that share no memory, or nothing.
    """
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_writer:
            copies[name] = whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


@torch.no_grad()
def fill_tensor(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """
    Copies a whole tensor into one that may be sharded, of which each process takes its part.

    Args:
        tensor (`torch.Tensor`):
            Where to.
        value (`torch.Tensor`):
            The values, of the same shape; the same in every process.
    """
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
