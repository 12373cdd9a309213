"""Keeps the outputs of a transformer's blocks from a rollout, so that its first update need not compute them again."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten


_state = threading.local()


def transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a transformer in the order in which they run."""
    return [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]


class RolloutActivations:
    """
    Outputs of all blocks of a transformer but the last, at each trained step of a rollout.

    Checkpointing starts from them when it recomputes blocks in the backward pass. As long as the weights are still those that
    drew the rollout, training can take them from here instead of running a forward pass of its own.

    Args:
        transformer (`torch.nn.Module`):
            The transformer, not wrapped. The shapes of its blocks' outputs must not depend on the prompts.
        num_images (`int`):
            Number of images of the rollout.
        num_steps (`int`):
            Number of trained steps.
    """

    def __init__(self, transformer: nn.Module, num_images: int, num_steps: int):
        self._blocks, self._num_images = transformer_blocks(transformer)[:-1], num_images
        # By trained step and call of a block: its outputs, each of shape (num_parts, num_images, ...). With classifier-free
        # guidance, a batch has two parts, one after the other.
        self._outputs: list[list[list[torch.Tensor]]] = [[] for _ in range(num_steps)]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that are kept."""
        return [part for step in self._outputs for parts in step for part in parts]

    @contextmanager
    def recording(self, k: int, rows: slice) -> Iterator[None]:
        """Context that records a forward pass for the images `rows` at trained step `k`."""
        kept, calls = self._outputs[k], itertools.count()
        num_rows = len(range(*rows.indices(self._num_images)))

        def keep(block: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            number = next(calls)
            parts = [part.unflatten(0, (-1, num_rows)) for part in output]
            if number == len(kept):
                kept.append([part.new_empty(len(part), self._num_images, *part.shape[2:]) for part in parts])
            for whole, part in zip(kept[number], parts, strict=True):
                whole[:, rows] = part

        handles = [block.register_forward_hook(keep) for block in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def select(self, images: torch.Tensor) -> None:
        """Drops all images but those at the indices `images`, `(num_kept,)`."""
        for step in self._outputs:
            for number, parts in enumerate(step):  # one at a time, so that two copies never exist of everything
                step[number] = [part[:, images] for part in parts]
        self._num_images = len(images)

    def of(self, k: int, rows: slice) -> list[list[torch.Tensor]]:
        """Returns the outputs for the images `rows` at trained step `k`, in the form that [`reusing`] takes."""
        return [[part[:, rows].flatten(0, 1) for part in parts] for parts in self._outputs[k]]


@contextmanager
def reusing(outputs: list[list[torch.Tensor]] | None) -> Iterator[None]:
    """
    Context in which checkpointed blocks return `outputs`, from [`~RolloutActivations.of`], instead of running. The backward pass
    recomputes them as usual. `None` changes nothing.
    """
    if outputs is None:
        yield
        return
    _state.outputs = iter(outputs)
    try:
        yield
        assert next(_state.outputs, None) is None, "the rollout ran more blocks than training"
    finally:
        _state.outputs = None


def reuse_outputs(
    block: Callable[..., Any], args: tuple[Any, ...], recomputing: Callable[[], AbstractContextManager]
) -> tuple[torch.Tensor, ...] | None:
    """
    Returns a block's outputs inside of [`reusing`], else `None`. `recomputing` makes the context in which the backward pass
    runs the block.
    """
    outputs = getattr(_state, "outputs", None)
    if outputs is None:
        return None
    assert isinstance(block, nn.Module)
    leaves, spec = tree_flatten(args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    inputs = [leaves[place] for place in places]
    others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    weights = {name: weight for name, weight in block.named_parameters() if weight.requires_grad}

    def compute(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        found = dict(zip(places, tensors, strict=False))
        own = dict(zip(weights, tensors[len(places) :], strict=True))
        with recomputing():
            return functional_call(
                block, own, tree_unflatten([found.get(place, other) for place, other in enumerate(others)], spec)
            )

    return _KnownBlock.apply(compute, next(outputs), *inputs, *weights.values())


class _KnownBlock(torch.autograd.Function):
    """
    A block whose outputs are known: its forward pass does nothing, and its backward pass runs the block first. The weights are
    arguments, so that their gradients arrive like those of other layers, where DDP waits for them.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable, outputs: list[torch.Tensor], *tensors: torch.Tensor):
        ctx.compute = compute
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if is_autocast else None
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None):
        tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
        autocast = nullcontext() if ctx.dtype is None else torch.autocast(tensors[0].device.type, ctx.dtype)
        with torch.enable_grad(), autocast:
            outputs = ctx.compute(tensors)
        pairs = zip(outputs, gradients, strict=True)
        used = [(output, gradient) for output, gradient in pairs if gradient is not None and output.requires_grad]
        torch.autograd.backward([output for output, _ in used], [gradient for _, gradient in used])
        return None, None, *(tensor.grad for tensor in tensors)
