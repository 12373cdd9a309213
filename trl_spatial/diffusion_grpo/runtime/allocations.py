"""Counts what a function allocates, on any device."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """
    Counts the bytes of tensors that are made while it is active, on any device, including the meta device, but not the
    weights of an `existing` model, the gradients they already have, or `others`. `peak` is the most at a time, including what cuDNN
    needs during a convolution in half precision: its kernels want channels last, so it copies their inputs and outputs.
    """

    def __init__(self, existing: nn.Module, others: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        gradients = (weight.grad for weight in existing.parameters() if weight.grad is not None)
        tensors = [*existing.parameters(), *existing.buffers(), *gradients, *others]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        copies = 0
        if func.overloadpacket is torch.ops.aten.convolution and output.dtype.itemsize == 2:
            copies = args[0].nbytes + output.nbytes
        self.peak = max(self.peak, self.live + copies)
        return output

    def _count(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += num_bytes
            weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


class _FusedAttention(torch.autograd.Function):
    """Allocates and saves what fused attention kernels do, without the matrix of all pairs of tokens."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Context with fused attention on the meta device, where PyTorch would use the plain form, which no accelerator does."""
    # A `torch.overrides` mode would miss what checkpointing recomputes: it does not reach into a backward pass.
    plain = nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.device.type == "meta":
            return _FusedAttention.apply(query, key, value)
        return plain(query, key, value, *args, **kwargs)

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def peak_of(function: Callable[[], Any], model: nn.Module, others: Sequence[torch.Tensor] = ()) -> int:
    """
    Returns the most bytes that a function allocates at a time, not counting the weights of the model that it runs, nor
    `others` that exist already.
    """
    # The tracker cannot see into compiled code, and there is nothing to compile for on the meta device
    with torch.compiler.set_stance("force_eager"), AllocationTracker(model, others) as tracker, _fused_attention():
        function()
    return tracker.peak
