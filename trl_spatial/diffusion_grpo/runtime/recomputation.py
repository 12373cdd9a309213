"""Gradient checkpointing that computes less again than a whole forward pass."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..policies import DiffusionPolicy


# The backward pass of a CUDA device, in which blocks are computed again, has a thread of its own.
_state = threading.local()


class UnreadLinear(nn.Linear):
    """
    A frozen layer whose output no backward pass reads. Where a block is computed again for its backward pass, the output is NaN
    in place of the product, so that whatever reads it after all cannot go unnoticed.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _UnreadProduct.apply(input, self.weight, self.bias)


class _UnreadProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        if getattr(_state, "is_recomputing", False):
            return input.new_full((*input.shape[:-1], len(weight)), math.nan)
        return functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient.matmul(weight.to(gradient.dtype)), None, None


def enable_checkpointing(policy: DiffusionPolicy, *, is_compiled: bool = False) -> None:
    """
    Has each block of the transformer computed again in the backward pass, with gradients that are the same bit for bit.

    Two parts of it are left out. The last block is not computed again: its backward pass is the first one, when what it
    has stored is all there is. And the products at the end of a block, a third or more of it, which only go into its
    output (see [`UnreadLinear`]), where the weights that are trained are those of the attention: other weights could
    make the gates trainable that these products are multiplied with. Compiled blocks are computed again as they are.
    """
    transformer = policy.transformer
    blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    trained = [name for name, weight in transformer.named_parameters() if weight.requires_grad]
    if not is_compiled and all("attn" in name or "attention" in name for name in trained):
        for block in blocks:
            for name, layer in block.named_modules():
                if name in policy.unread_outputs and type(layer) is nn.Linear:
                    layer.__class__ = UnreadLinear

    def compute_block(block: Callable[..., Any], *args: Any) -> Any:
        if block is blocks[-1]:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _recomputing()))

    transformer.enable_gradient_checkpointing(compute_block)


@contextmanager
def _recomputing() -> Iterator[None]:
    _state.is_recomputing = True
    try:
        yield
    finally:
        _state.is_recomputing = False
