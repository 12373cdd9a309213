"""Gradient checkpointing that recomputes less than a whole forward pass."""

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
from .activations import reuse_outputs, transformer_blocks


# On CUDA, the backward pass, which recomputes blocks, runs in its own thread.
_state = threading.local()


class UnreadLinear(nn.Linear):
    """
    A frozen layer whose output no backward pass reads. When a block is recomputed for its backward pass, the output is NaN instead
    of the product, so that nothing can read it unnoticed.
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
    Makes the backward pass recompute each block of the transformer, with gradients that are the same bit for bit.

    Two parts are not recomputed. One is the last block: its backward pass comes first, when its stored activations are all
    there is. The other is the products at the end of a block, a third or more of it, which only go into its output (see
    [`UnreadLinear`]). They are left out if only attention weights are trained: other weights could change the gates that
    multiply these products, and the gradient of a gate reads its product. Compiled blocks are recomputed in full.
    """
    transformer = policy.transformer
    blocks = transformer_blocks(transformer)
    trained = [name for name, weight in transformer.named_parameters() if weight.requires_grad]
    if not is_compiled and all("attn" in name or "attention" in name for name in trained):
        for block in blocks:
            for name, layer in block.named_modules():
                if name in policy.unread_outputs and type(layer) is nn.Linear:
                    layer.__class__ = UnreadLinear

    def compute_block(block: Callable[..., Any], *args: Any) -> Any:
        if block is blocks[-1]:
            return block(*args)
        if (outputs := reuse_outputs(block, args, _recomputing)) is not None:
            return outputs
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _recomputing()))

    transformer.enable_gradient_checkpointing(compute_block)


@contextmanager
def _recomputing() -> Iterator[None]:
    _state.is_recomputing = True
    try:
        yield
    finally:
        _state.is_recomputing = False
