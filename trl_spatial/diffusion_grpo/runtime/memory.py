"""How much memory of an accelerator a training run will need, from its configuration alone: no weights are loaded."""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ...generation.seeds import image_generator
from ..config import DiffusionGRPOConfig
from ..nft.config import DiffusionNFTConfig
from ..online_config import OnlineConfig
from ..policies.base import NEGATIVE_PREFIX, SamplingOptions
from .architectures import Architecture, build_component, build_policy, load_architecture
from .model_setup import is_large_text_encoder, prepare_transformer, sampling_options
from .prompt_cache import DEFAULT_MAX_BYTES


# Bits that a weight of a linear layer takes. NF4 of bitsandbytes: 4, a scale of 8 for every 64 weights, and one of 32 for every
# 256 of those scales. LLM.int8: 8, and a scale of 32 for every row, which is added where the rows are known.
WEIGHT_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0}
# GiB of the usual cards that a program can use: what the driver reports, without the 1.5 GiB of the CUDA context, the libraries'
# workspaces and the gaps between allocations
GPU_GIB = {24: 22.0, 40: 37.9, 80: 77.7}
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of one run on one device, in bytes."""

    parts: dict[str, int]  # some are never there at the same time
    phases: dict[str, int]  # all that is there in a phase, such as "encode", "sample" or "evaluate: decode"

    @property
    def total(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())

    @property
    def fits(self) -> list[int]:
        """Which of the usual cards have enough, by their size in GB."""
        return [size for size, usable in GPU_GIB.items() if self.total <= usable * GIB]


class AllocationTracker(TorchDispatchMode):
    """
    Counts the bytes of the tensors that are made while it is active, on any device, the meta device too, but for the
    weights of an `existing` model. `peak` is the most at a time.
    """

    def __init__(self, existing: nn.Module):
        super().__init__()
        self.live = self.peak = 0
        tensors = [*existing.parameters(), *existing.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
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
    """What fused kernels of attention allocate and save, without the matrix of all pairs of tokens."""

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
    """On the meta device PyTorch would take the plain form of attention, which no accelerator does."""
    # A mode of `torch.overrides` would end where checkpointing computes again: it does not reach into a backward pass.
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


def peak_of(function: Callable[[], Any], model: nn.Module) -> int:
    """The most bytes that a function has allocated at a time, besides the weights of the model that it runs."""
    with AllocationTracker(model) as tracker, _fused_attention():
        function()
    return tracker.peak


def weight_bytes(module: nn.Module, quantization: str | None = None, dtype: torch.dtype = torch.bfloat16) -> int:
    """
    Bytes of the frozen weights of a model on any device: those of its linear layers as `"nf4"` or `"int8"` if
    `quantization` says so, the others in `dtype`.
    """
    linear = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if isinstance(module, PreTrainedModel):  # transformers leaves some as they are: the output layer, T5's `wo`
        kept = HfQuantizer.get_modules_to_not_convert(module, None, module._keep_in_fp32_modules)
        linear = {name for name in linear if should_convert_module(name.removesuffix(".weight"), kept)}
    num_bits = 8.0 * dtype.itemsize * sum(buffer.numel() for buffer in module.buffers())
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            continue
        is_quantized = quantization is not None and name in linear
        num_bits += weight.numel() * (WEIGHT_BITS[quantization] if is_quantized else 8 * dtype.itemsize)  # type: ignore[index]
        if is_quantized and quantization == "int8":
            num_bits += 32 * len(weight)
    return int(num_bits / 8)


class MemoryModel:
    """
    Predicts the memory of a run on each device. A denoising step of sampling and of training, and the VAE, are run on
    the meta device, where tensors have sizes but no contents; what they allocate is counted.

    `policy.vae.enable_slicing()` and `enable_tiling()` are taken into account. What it does not know: the kernels'
    workspaces, the activations of reward models, and autocast, under which only weights of float32 are trained, as all of
    a transformer is; activations count as float32 there.

    `architecture` is from [`load_architecture`]; `peft_config` is `None` if all weights are trained; `dtype` is the
    type of what is frozen and not quantized, `reward_bytes` the size of the reward models on the device, and
    `text_encoders_in_4bit` says whether the large text encoders are quantized to NF4.
    """

    def __init__(
        self,
        architecture: Architecture,
        args: OnlineConfig,
        peft_config: LoraConfig | None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        reward_bytes: int = 0,
        text_encoders_in_4bit: bool = False,
    ):
        self.text_encoders_in_4bit = text_encoders_in_4bit
        self.args, self.dtype, self.reward_bytes = args, dtype, reward_bytes
        self.policy = build_policy(architecture, max_sequence_length=args.max_sequence_length)
        self.policy.check_size(args.height, args.width)
        for module in (self.policy.transformer, self.policy.vae, *self.policy.encoders):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
        self.transformer: Any = prepare_transformer(self.policy, args, peft_config)
        self._options, self._eval_options = sampling_options(args)
        self.num_trained = sum(weight.numel() for weight in self.transformer.parameters() if weight.requires_grad)
        self._peaks: dict[str, int] = {}

    def estimate(
        self, *, quantization: str | None = None, gradient_checkpointing: bool = True, offload_vae: bool = False
    ) -> MemoryEstimate:
        """
        Adds up what the run needs if the frozen transformer is quantized to `"nf4"` or `"int8"`, activations are
        computed again in the backward pass, and the VAE is on the device only while it decodes.
        """
        trained = 4 * self.num_trained
        linear = [layer.weight.numel() for layer in self.transformer.modules() if isinstance(layer, nn.Linear)]
        unpacked = 0 if quantization is None else max(linear) * self.dtype.itemsize  # one layer's weights, in its turn
        vae = weight_bytes(self.policy.vae, dtype=self.dtype)
        # With an old policy, which draws the images, the trained weights are kept aside in a rollout too
        old_policy = trained if isinstance(self.args, DiffusionNFTConfig) else 0
        num_trained = self.args.per_device_train_batch_size
        num_sampled, num_evaluated = self.args.sampling_batch_size, self.args.eval_sampling_batch_size
        state = {
            "frozen weights": weight_bytes(self.transformer, quantization, self.dtype),
            "trained weights": trained,
            "their gradients and AdamW": 3 * trained,
            "average of the weights": trained if self.args.ema_decay > 0 else 0,
            **({"old policy": old_policy} if old_policy else {}),
            "latents of a rollout": self._rollout_bytes(),
            "prompt embeddings": max(num_trained, num_sampled, num_evaluated) * self._embeds_row_bytes(),
            "reward models": self.reward_bytes,
        }
        parts = state | {
            "text encoders": self._encoder_bytes(),
            "VAE": vae,
            "decoding": self._peak("decoding", lambda: self._decode(num_sampled, self._options)),
            "sampling step": unpacked + self._peak("sampling", lambda: self._sample(num_sampled, self._options)),
            "training step": unpacked
            + self._peak(f"training {gradient_checkpointing}", lambda: self._train(gradient_checkpointing)),
            "trained weights kept aside": max(state["average of the weights"], old_policy),
            "decoding in evaluation": self._peak(
                "decoding in evaluation", lambda: self._decode(num_evaluated, self._eval_options)
            ),
            "sampling step in evaluation": unpacked
            + self._peak("sampling in evaluation", lambda: self._sample(num_evaluated, self._eval_options)),
        }
        resident = sum(state.values()) + (0 if offload_vae else vae)
        aside = resident + state["average of the weights"]
        phases = {
            "encode": resident + parts["text encoders"],
            "sample": resident + old_policy + parts["sampling step"],
            "decode": resident + old_policy + (vae if offload_vae else 0) + parts["decoding"],
            "train": resident + parts["training step"],
            "evaluate: sample": aside + parts["sampling step in evaluation"],
            "evaluate: decode": aside + (vae if offload_vae else 0) + parts["decoding in evaluation"],
        }
        return MemoryEstimate(parts, phases)

    def host_bytes(self, *, offload_vae: bool = False) -> int:
        """
        What each process keeps in the memory of its machine, in bytes: text encoders, the cache of prompt embeddings, a row of
        them for each image or scout of a rollout, and a VAE that is offloaded.
        """
        vae = weight_bytes(self.policy.vae, dtype=self.dtype) if offload_vae else 0
        num_images = self.args.num_prompts_per_device * max(self.args.num_drawn, self.args.num_scouts or 0)
        return self._encoder_bytes() + DEFAULT_MAX_BYTES + num_images * self._embeds_row_bytes() + vae

    def _peak(self, name: str, measure: Callable[[], int]) -> int:
        if name not in self._peaks:
            self._peaks[name] = measure()
        return self._peaks[name]

    def _embeds(self, num_images: int) -> dict[str, torch.Tensor]:
        """Embeddings of the longest prompts, without contents; those of the negative prompt among them."""
        embeds = {
            # of a mask it is asked which tokens are padding
            name: torch.ones(shape, dtype=torch.long)
            if name.endswith("mask")
            else torch.empty(shape, dtype=self.dtype, device="meta")
            for name, shape in self.policy.embed_shapes(num_images).items()
        }
        if self.policy.negative_prompt(self._options) is None:
            return embeds
        return embeds | {f"{NEGATIVE_PREFIX}{name}": tensor for name, tensor in embeds.items()}

    def _latents(self, num_images: int, options: SamplingOptions) -> torch.Tensor:
        return self.policy.prepare_latents([image_generator(0, image) for image in range(num_images)], options)

    def _predict(self, num_images: int, options: SamplingOptions) -> Callable[[], torch.Tensor]:
        inputs = (self._latents(num_images, options), torch.tensor(0.5), self._embeds(num_images), options)
        return lambda: self.policy.predict_velocity(self.transformer, *inputs)

    @torch.no_grad()
    def _sample(self, num_images: int, options: SamplingOptions) -> int:
        self.transformer.eval()
        return peak_of(self._predict(num_images, options), self.transformer)

    def _train(self, gradient_checkpointing: bool) -> int:
        self.transformer.train()
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()
        predict = self._predict(self.args.per_device_train_batch_size, self._options)
        peak = peak_of(lambda: predict().mean().backward(), self.transformer)
        gradients = sum(weight.grad.nbytes for weight in self.transformer.parameters() if weight.grad is not None)
        self.transformer.zero_grad()
        return peak - gradients  # they have a line of their own

    def _decode(self, num_images: int, options: SamplingOptions) -> int:
        latents = self._latents(num_images, options)
        return peak_of(lambda: self.policy.decode_latents(latents, options), self.policy.vae)

    def _encoder_bytes(self) -> int:
        num_bytes = 0
        for name, module in self.policy.pipeline.components.items():
            if module in self.policy.encoders:
                is_quantized = self.text_encoders_in_4bit and is_large_text_encoder(name, type(module).__name__)
                num_bytes += weight_bytes(module, "nf4" if is_quantized else None, self.dtype)
        return num_bytes

    def _rollout_bytes(self) -> int:
        # the last ones, and before and after each trained step
        args, num_latents = self.args, 1
        if isinstance(args, DiffusionGRPOConfig):
            num_latents += 2 * (args.sde_window_size or args.num_inference_steps - 1)
        return args.num_prompts_per_device * args.num_drawn * num_latents * self._latents(1, self._options).nbytes

    def _embeds_row_bytes(self) -> int:
        # of a prompt as long as may be; rows of the negative prompt are one and the same memory
        rows = self._embeds(1).items()
        return sum(row.nbytes for name, row in rows if not name.startswith(NEGATIVE_PREFIX))


def describe_options(model: MemoryModel, *, offload_vae: bool = False) -> str:
    """
    Compares the options that save memory in two tables: the parts of each quantization, with the VAE as in the run,
    and the total of each option with the cards that have enough.
    """
    quantizations: tuple[str | None, ...] = (None, "int8", "nf4")
    if model.num_trained == sum(weight.numel() for weight in model.transformer.parameters()):
        quantizations = (None,)  # what is trained cannot be quantized
    args = model.args
    settings = {"gradient_checkpointing": bool(args.gradient_checkpointing), "offload_vae": offload_vae}
    estimates = [model.estimate(quantization=quantization, **settings) for quantization in quantizations]
    names = [str(model.dtype).removeprefix("torch.") if name is None else name for name in quantizations]
    lines = [
        f"{args.width} × {args.height} pixels, {args.per_device_train_batch_size} images at once in training, "
        f"{args.sampling_batch_size} in sampling, {model.num_trained:,} trained parameters",
        "",
        "GiB on each device" + " " * 12 + "".join(f"{name:>10}" for name in names),
    ]
    for part in estimates[0].parts:
        lines.append(f"{part:<30}" + "".join(f"{estimate.parts[part] / GIB:10.2f}" for estimate in estimates))
    for phase in estimates[0].phases:
        cells = "".join(f"{estimate.phases[phase] / GIB:10.2f}" for estimate in estimates)
        lines.append(f"{f'needed to {phase}':<30}{cells}")
    lines += ["", f"{'weights':<10}{'checkpointing':>14}{'VAE offloaded':>15}{'most GiB':>10}{'in':>18}  fits (GB)"]
    for name, quantization in zip(names, quantizations, strict=True):
        for checkpointing in (True, False):
            for offload in (False, True):
                estimate = model.estimate(
                    quantization=quantization, gradient_checkpointing=checkpointing, offload_vae=offload
                )
                phase = max(estimate.phases, key=lambda name: estimate.phases[name])
                lines.append(
                    f"{name:<10}{'yes' if checkpointing else 'no':>14}{'yes' if offload else 'no':>15}"
                    f"{estimate.total / GIB:10.2f}{phase:>18}  {', '.join(map(str, estimate.fits)) or 'none'}"
                )
    host = model.host_bytes(offload_vae=offload_vae) / GIB
    lines += [
        "",
        f"On the host each process keeps {host:.1f} GiB, eight on a node {8 * host:.0f}: text encoders, and prompt embeddings up to "
        f"{DEFAULT_MAX_BYTES / GIB:.0f} GiB.",
        f"Reward models: {model.reward_bytes / GIB:.2f} GiB, counted as SpatialScore on Qwen2.5-VL-7B in bfloat16. The size of "
        "functions from modules is unknown.",
        "The cards' sizes are what is left after 2 GB for CUDA and gaps between allocations.",
    ]
    return "\n".join(lines)


def reward_model_bytes(names: Sequence[str]) -> int:
    """
    Bytes of the reward models on the device, named as for [`~trl_spatial.rewards.load_reward`]. Each is taken for a
    SpatialScore model on Qwen2.5-VL-7B in bfloat16 without its small head, which is the text encoder of Qwen-Image.
    Rules, and functions from modules, whose size is unknown, count as 0.
    """
    num_models = sum(name != "rules" and not re.fullmatch(r"[\w.]+:\w+", name) for name in names)
    if num_models == 0:
        return 0
    encoder = build_component(*load_architecture("Qwen/Qwen-Image")["text_encoder"])
    return num_models * weight_bytes(encoder.requires_grad_(False))
