"""True architectures as fake tensors, which have sizes and types but no contents, and what a pass over them takes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trl_spatial.diffusion_grpo.runtime.allocations import AllocationTracker


aten = torch.ops.aten
# The fused attention that PyTorch takes on a CPU saves what those on CUDA save
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
# They compute in float32 under CUDA's autocast, and not under the CPU's
_FLOAT32_UNDER_AUTOCAST = ("layer_norm", "rms_norm", "group_norm")


class Counts(AllocationTracker):
    """
    What a pass takes: memory, floating-point operations of matrix products and of attention, bytes that are read and written
    where a type changes, and calls of attention. PyTorch's `FlopCounterMode` would keep what checkpointing computes again.
    """

    def __init__(self, existing: nn.Module, others: Sequence[torch.Tensor] = ()):
        super().__init__(existing, others)
        self.flops = self.cast_bytes = self.num_attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.index.Tensor:  # of fake masks it would not be known how many rows they choose
            args = (args[0], [at for index in args[1] for at in _as_indices(index)])
        output = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func.overloadpacket
        if packet is _ATTENTION:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
            self.num_attentions += 1
        elif packet is _ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        elif packet is aten._to_copy:
            self.cast_bytes += args[0].nbytes + output.nbytes
        elif (counted := aten.addmm if packet is aten.addmm_ else packet) in flop_registry:
            self.flops += flop_registry[counted](*args, **(kwargs or {}), out_val=output)
        return output

    def take(self) -> dict[str, int]:
        """What was counted since the last time; the peak is above the weights."""
        names = ("flops", "peak_bytes", "cast_bytes", "num_attentions")
        counts = dict(zip(names, (self.flops, self.peak, self.cast_bytes, self.num_attentions), strict=True))
        self.flops = self.cast_bytes = self.num_attentions = 0
        self.peak = self.live
        return counts


def _as_indices(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero(as_tuple=True))


def make_fake(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype = torch.bfloat16) -> None:
    """Moves a model from the meta device to the CPU: a fake tensor for CUDA needs a PyTorch that is built for it."""
    fakes: dict[torch.Tensor, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in fakes:  # some weights are shared
            data = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
            copy: torch.Tensor = FakeTensor(mode, data, torch.device("cpu"))
            fakes[tensor] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        return fakes[tensor]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers, vars(part)):  # Qwen-Image's rotations are attributes
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                    tensors[name] = fake(tensor)


@contextmanager
def like_cuda() -> Iterator[None]:
    """
    On the CPU, where fake tensors are: autocast with the norms of CUDA's, which compute in float32 and return it, and models
    that do not move, as PyTorch cannot move fake ones.
    """

    def with_float32(plain):
        def norm(input, *args, **kwargs):
            if not torch.is_autocast_enabled("cpu"):
                return plain(input, *args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                args = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
                kwargs = {key: arg.float() if isinstance(arg, torch.Tensor) else arg for key, arg in kwargs.items()}
                return plain(input.float(), *args, **kwargs)

        return norm

    with pytest.MonkeyPatch.context() as patch:
        for name in _FLOAT32_UNDER_AUTOCAST:
            patch.setattr(nn.functional, name, with_float32(getattr(nn.functional, name)))
        patch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)
        yield
