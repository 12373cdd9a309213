"""Float32 adapters on frozen bfloat16 weights, without autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """
    Context in which the adapters of a model are switched off. diffusers' `disable_adapters` does the same, but reads PEFT's version
    from its files each time.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class AdapterLinear(nn.Linear):
    """A matrix of an adapter, multiplied in the dtype of its input, whatever its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class InPlaceLora(lora.Linear):
    """
    PEFT's LoRA linear layer, which adds the adapter's product to the frozen layer's output in place. It has no dropout, which the
    trainers refuse.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        result = self.base_layer(x)
        hidden, matrix = self.lora_A[adapter](x), self.lora_B[adapter].weight
        return _AddProduct.apply(result, hidden.to(result.dtype), matrix.to(result.dtype), self.scaling[adapter])


class _AddProduct(torch.autograd.Function):
    """
    Computes `result + scaling * hidden @ matrix.T` in place: no backward pass reads the output of a linear layer. `result` has the
    shape `(..., out_features)`, `hidden` `(..., rank)` and `matrix` `(out_features, rank)`, all in one dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, hidden: torch.Tensor, matrix: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, matrix)
        ctx.scaling = scaling
        ctx.mark_dirty(result)
        result.view(-1, len(matrix)).addmm_(hidden.flatten(0, -2), matrix.T, alpha=scaling)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        (gradient,), (hidden, matrix) = gradients, ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_matrix = rows.T.mm(hidden.flatten(0, -2)) * ctx.scaling
        return gradient, gradient.matmul(matrix * ctx.scaling), of_matrix, None


def adapt_to_inputs(transformer: nn.Module, *, is_compiled: bool = False) -> None:
    """
    Makes the adapters of linear layers compute in the dtype of the frozen layers around them, and add their products in place.

    PEFT casts an adapter's input to the dtype of the adapter's weights. In float32, that makes small products slow and large
    tensors larger. Autocast would undo it, but on CUDA autocast also runs the norms in float32 and returns float32, so that
    most inputs of the frozen layers are cast twice, and the images differ from the pipeline's.

    PEFT also scales and adds an adapter's product in separate passes over tensors as large as the layer's output. A compiler
    removes these passes by itself; quantized layers are left to PEFT.
    """
    for layer in transformer.modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        matrices = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices):
            layer.cast_input_dtype_enabled = False
            for matrix in matrices:
                matrix.__class__ = AdapterLinear
            if type(layer) is lora.Linear and not layer.lora_variant and not is_compiled:
                layer.__class__ = InPlaceLora
