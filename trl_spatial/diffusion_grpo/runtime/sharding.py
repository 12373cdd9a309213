"""
Tensors of a transformer whose weights are sharded across processes (FSDP2): `DTensor`s, of which each process holds a part.
They are gathered, layer by layer, for each forward and backward pass.
"""

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_tensors(tensors: Mapping[str, torch.Tensor], *, is_writer: bool = True) -> dict[str, torch.Tensor]:
    """
    Copies tensors to the CPU, whole, contiguous and without shared memory. If they are sharded, all processes have to
    call this. Only `is_writer` gets the copies: they may not fit on a GPU together, nor several times on the CPU.
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
    Copies a whole tensor, the same in every process, into one that may be sharded; each process takes its part.
    """
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
