"""Adapters of float32 beside frozen weights of bfloat16, without autocast."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional


class AdapterLinear(nn.Linear):
    """A matrix of an adapter. It is multiplied in the dtype of its input, whatever its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


def adapt_to_inputs(transformer: nn.Module) -> None:
    """
    Makes the adapters of linear layers compute in the dtype of the frozen layers around them.

    PEFT casts what comes into an adapter to the dtype of the adapter's weights. In float32 that makes small products slow
    and large tensors larger. Autocast would undo it, but on CUDA autocast also runs the norms in float32 and returns
    float32, so that most of what the frozen layers read is cast twice, and images are not those of the pipeline.
    """
    for layer in transformer.modules():
        if not isinstance(layer, LoraLayer):
            continue
        matrices = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices):
            layer.cast_input_dtype_enabled = False
            for matrix in matrices:
                matrix.__class__ = AdapterLinear
