"""Predicts how much accelerator memory a training run needs, from its configuration alone, without loading weights."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.training_args import OptimizerNames

from ...generation.seeds import image_generator
from ...hub.functions import is_function
from ..config import DiffusionGRPOConfig
from ..nft.config import DiffusionNFTConfig
from ..online_config import OnlineConfig
from ..policies.base import NEGATIVE_PREFIX, SamplingOptions
from .activations import RolloutActivations, reusing
from .allocations import peak_of
from .architectures import Architecture, build_component, build_policy, load_architecture
from .base_config import DiffusionConfig
from .checks import check_images
from .model_setup import is_large_text_encoder, prepare_transformer, sampling_options
from .processes import is_fsdp_launch
from .prompt_cache import DEFAULT_MAX_BYTES


# Bits per weight of a linear layer. bitsandbytes' NF4 takes 4, an 8-bit scale for every 64 weights, and a 32-bit scale for every
# 256 of those scales. LLM.int8 takes 8, and a 32-bit scale for every row, which is added where the rows are known.
WEIGHT_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0}
# Usable GiB of common cards: what the driver reports, less 1.5 GiB for the CUDA context, the libraries' workspaces and the gaps
# between allocations
GPU_GIB = {24: 22.0, 40: 37.9, 80: 77.7}
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of one run on one device, in bytes."""

    parts: dict[str, int]  # some never exist at the same time
    phases: dict[str, int]  # the total in each phase, such as "encode", "sample" or "evaluate: decode"

    @property
    def total(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())

    @property
    def fits(self) -> list[int]:
        """Sizes in GB of the common cards that have enough."""
        return [size for size, usable in GPU_GIB.items() if self.total <= usable * GIB]


def weight_bytes(module: nn.Module, quantization: str | None = None, dtype: torch.dtype = torch.bfloat16) -> int:
    """
    Returns the bytes of a model's frozen weights, on any device: those of linear layers in `"nf4"` or `"int8"` if
    `quantization` says so, the others in `dtype`.
    """
    linear = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if isinstance(module, PreTrainedModel):  # transformers leaves some unquantized: the output layer, T5's `wo`
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
    Predicts the memory of a run on each device. It runs a denoising step of sampling and of training, and the VAE, on the
    meta device, where tensors have sizes but no contents, and counts what they allocate.

    `policy.vae.enable_slicing()` and `enable_tiling()` are taken into account, and so are the gradient buckets that the
    launched processes exchange, which are as large as the gradients. Not modeled are the kernels' workspaces, a compiler, the
    reward models' activations, and autocast, which is only used to train whole transformers, in float32; their activations
    count as float32.

    `architecture` is from [`load_architecture`]; `peft_config` is `None` if all weights are trained; `dtype` is the
    dtype of frozen weights that are not quantized, `reward_bytes` the size of the reward models on the device, and
    `text_encoders_in_4bit` says whether the large text encoders are quantized to NF4.
    """

    def __init__(
        self,
        architecture: Architecture,
        args: DiffusionConfig,
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
        self._options, self._eval_options = sampling_options(self.policy, args)
        self._is_online, self._is_evaluated = isinstance(args, OnlineConfig), args.eval_strategy != "no"
        if self._is_evaluated:
            check_images(self.policy, self._eval_options)
        self.num_trained_images = args.per_device_train_batch_size * (1 if self._is_online else 2)  # both of a pair
        self.num_trained = sum(weight.numel() for weight in self.transformer.parameters() if weight.requires_grad)
        self._peaks: dict[str, int] = {}

    def estimate(
        self, *, quantization: str | None = None, gradient_checkpointing: bool = True, offload_vae: bool = False
    ) -> MemoryEstimate:
        """
        Adds up what the run needs, depending on whether the frozen transformer is quantized to `"nf4"` or `"int8"`,
        activations are recomputed in the backward pass, and the VAE is on the device only while it runs.
        """
        state, steps = self._state_bytes(quantization), self._step_bytes(quantization, gradient_checkpointing)
        vae = weight_bytes(self.policy.vae, dtype=self.dtype)
        # While their average or the old policy draws, the trained weights are kept aside
        average, old_policy = state["average of the weights"], state.get("old policy", 0)
        parts = state | {"text encoders": self._encoder_bytes(), "VAE": vae} | steps
        if self._is_online or self._is_evaluated:
            parts["trained weights kept aside"] = max(average if self._is_evaluated else 0, old_policy)
        resident = sum(state.values()) + (0 if offload_vae else vae)
        fetched = vae if offload_vae else 0
        phases = {"encode": resident + parts["text encoders"]}
        drawn, kept = self._activation_bytes() if gradient_checkpointing else (0, 0)
        if drawn > 0:
            parts["activations of a rollout"] = drawn
        if self._is_online:
            phases["sample"] = resident + old_policy + drawn + steps["sampling step"]
            phases["decode"] = resident + old_policy + drawn + fetched + steps["decoding"]
        else:
            phases["encode images"] = resident + fetched + steps["encoding images"]
        phases["train"] = resident + kept + steps["training step"]
        if self._is_evaluated:
            phases["evaluate: sample"] = resident + average + steps["sampling step in evaluation"]
            phases["evaluate: decode"] = resident + average + fetched + steps["decoding in evaluation"]
        return MemoryEstimate(parts, phases)

    def _state_bytes(self, quantization: str | None) -> dict[str, int]:
        """Bytes on the device in every phase, without the VAE."""
        args, trained = self.args, 4 * self.num_trained
        state = {
            "frozen weights": weight_bytes(self.transformer, quantization, self.dtype),
            "trained weights": trained,
            "their gradients and AdamW": 3 * trained,
            "average of the weights": trained if args.ema_decay > 0 else 0,
        }
        if args.world_size > 1 and not is_fsdp_launch():
            state["gradients being exchanged"] = trained
        if isinstance(args, DiffusionNFTConfig):
            state["old policy"] = trained
        if isinstance(args, OnlineConfig):
            state["latents of a rollout"] = self._rollout_bytes(args)
        num_rows = max(self.num_trained_images, args.sampling_batch_size, args.eval_sampling_batch_size)
        return state | {"prompt embeddings": num_rows * self._embeds_row_bytes(), "reward models": self.reward_bytes}

    def _step_bytes(self, quantization: str | None, gradient_checkpointing: bool) -> dict[str, int]:
        """Additional bytes on the device while a batch of images is drawn, decoded, encoded or trained on."""
        args, training, evaluation = self.args, self._options, self._eval_options
        linear = [layer.weight.numel() for layer in self.transformer.modules() if isinstance(layer, nn.Linear)]
        unpacked = 0 if quantization is None else max(linear) * self.dtype.itemsize  # one layer's weights at a time
        steps = {}
        if self._is_online:
            num_images = args.sampling_batch_size
            steps["decoding"] = self._peak("decoding", lambda: self._decode(num_images, training))
            steps["sampling step"] = unpacked + self._peak("sampling", lambda: self._sample(num_images, training))
        else:
            steps["encoding images"] = self._peak("encoding images", self._encode_images)
        steps["training step"] = unpacked + self._peak(
            f"training {gradient_checkpointing}", lambda: self._train(gradient_checkpointing)
        )
        if self._is_evaluated:
            num_evaluated = args.eval_sampling_batch_size
            steps["decoding in evaluation"] = self._peak(
                "decoding in evaluation", lambda: self._decode(num_evaluated, evaluation)
            )
            steps["sampling step in evaluation"] = unpacked + self._peak(
                "sampling in evaluation", lambda: self._sample(num_evaluated, evaluation)
            )
        return steps

    def host_bytes(self, *, offload_vae: bool = False) -> int:
        """
        Bytes that each process keeps in host memory: text encoders, the cache of prompt embeddings, a row of embeddings for each
        image or scout of a rollout, and the VAE if it is offloaded.
        """
        vae = weight_bytes(self.policy.vae, dtype=self.dtype) if offload_vae else 0
        args, num_images = self.args, 0
        if isinstance(args, OnlineConfig):
            num_images = args.num_prompts_per_device * max(args.num_drawn, args.num_scouts or 0)
        return self._encoder_bytes() + DEFAULT_MAX_BYTES + num_images * self._embeds_row_bytes() + vae

    def _peak(self, name: str, measure: Callable[[], int]) -> int:
        if name not in self._peaks:
            self._peaks[name] = measure()
        return self._peaks[name]

    def _embeds(self, num_images: int, options: SamplingOptions) -> dict[str, torch.Tensor]:
        """Embeddings of prompts of maximum length, without contents, including those of the negative prompt."""
        embeds = {
            # a mask is read to find the padding
            name: torch.ones(shape, dtype=torch.long)
            if name.endswith("mask")
            else torch.empty(shape, dtype=self.dtype, device="meta")
            for name, shape in self.policy.embed_shapes(num_images).items()
        }
        if self.policy.negative_prompt(options) is None:
            return embeds
        return embeds | {f"{NEGATIVE_PREFIX}{name}": tensor for name, tensor in embeds.items()}

    def _latents(self, num_images: int, options: SamplingOptions) -> torch.Tensor:
        return self.policy.prepare_latents([image_generator(0, image) for image in range(num_images)], options)

    def _predict(self, num_images: int, options: SamplingOptions) -> Callable[[], torch.Tensor]:
        inputs = (self._latents(num_images, options), torch.tensor(0.5), self._embeds(num_images, options), options)
        return lambda: self.policy.predict_velocity(self.transformer, *inputs)

    @torch.no_grad()
    def _sample(self, num_images: int, options: SamplingOptions) -> int:
        self.transformer.eval()
        return peak_of(self._predict(num_images, options), self.transformer)

    def _train(self, gradient_checkpointing: bool) -> int:
        self.transformer.train()
        if gradient_checkpointing:
            self.transformer.gradient_checkpointing_enable()
        else:
            self.transformer.disable_gradient_checkpointing()
        predict = self._predict(self.num_trained_images, self._options)
        # Gradients are counted separately, and exist from the second batch on.
        for weight in self.transformer.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        is_reusing = gradient_checkpointing and self._reuses_activations
        kept = self._activations(self.num_trained_images) if is_reusing else None

        def step() -> None:
            with reusing(None if kept is None else kept.of(0, slice(None))):
                velocity = predict()
            velocity.mean().backward()

        peak = peak_of(step, self.transformer, [] if kept is None else kept.tensors)
        self.transformer.zero_grad()
        return peak

    @property
    def _reuses_activations(self) -> bool:
        return isinstance(self.args, DiffusionGRPOConfig) and self.args.reuses_activations

    @torch.no_grad()
    def _activations(self, num_images: int) -> RolloutActivations:
        """What is kept of one trained step."""
        activations = RolloutActivations(self.transformer, num_images, 1)
        with activations.recording(0, slice(None)):
            self._predict(num_images, self._options)()
        return activations

    def _activation_bytes(self) -> tuple[int, int]:
        """Size of the activations that are kept of a rollout: of all images, and of those that are trained on."""
        if not self._reuses_activations:
            return 0, 0
        args = self.args
        num_images = args.num_prompts_per_device * args.num_trained_steps
        per_image = self._peak("activations", lambda: sum(part.nbytes for part in self._activations(1).tensors))
        return num_images * args.num_drawn * per_image, num_images * args.num_kept * per_image

    def _encode_images(self) -> int:
        images = [Image.new("RGB", (self._options.width, self._options.height))] * self.num_trained_images
        return peak_of(lambda: self.policy.encode_images(images), self.policy.vae)

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

    def _rollout_bytes(self, args: OnlineConfig) -> int:
        num_latents = args.num_drawn  # per prompt: the final ones, and those before and after each trained step
        if isinstance(args, DiffusionGRPOConfig):
            num_steps = args.num_trained_steps
            num_latents += 2 * num_steps * args.num_drawn
            if args.num_updates_per_rollout > 1 and args.needs_old_means:  # next to the kept images' latents
                num_latents = max(num_latents, 3 * num_steps * args.num_kept)
        num_latents = max(num_latents, args.num_scouts or 0)  # scouts come first, with only their final latents
        return args.num_prompts_per_device * num_latents * self._latents(1, self._options).nbytes

    def _embeds_row_bytes(self) -> int:
        # for a prompt of maximum length; all rows of the negative prompt share the same memory
        rows = self._embeds(1, self._options).items()
        return sum(row.nbytes for name, row in rows if not name.startswith(NEGATIVE_PREFIX))


def describe_options(model: MemoryModel, *, offload_vae: bool = False) -> str:
    """
    Compares the options that save memory in two tables: the parts of each quantization, with the VAE as in the run,
    and the total of each option with the cards that have enough.
    """
    quantizations: tuple[str | None, ...] = (None, "int8", "nf4")
    if model.num_trained == sum(weight.numel() for weight in model.transformer.parameters()):
        quantizations = (None,)  # trained weights cannot be quantized
    args = model.args
    settings = {"gradient_checkpointing": bool(args.gradient_checkpointing), "offload_vae": offload_vae}
    estimates = [model.estimate(quantization=quantization, **settings) for quantization in quantizations]
    names = [str(model.dtype).removeprefix("torch.") if name is None else name for name in quantizations]
    sampling = f"{args.sampling_batch_size} in sampling, " if isinstance(args, OnlineConfig) else ""
    lines = [
        f"{args.width} × {args.height} pixels, {model.num_trained_images} images at a time in training, {sampling}"
        f"{model.num_trained:,} trained parameters",
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
        "functions from modules and of detectors is unknown.",
        "The cards' sizes are what is left after 2 GB for CUDA and gaps between allocations.",
    ]
    optimizer = OptimizerNames(args.optim).value
    if optimizer not in ("adamw_torch", "adamw_torch_fused"):
        lines.append(f"`optim` is {optimizer!r}, but is counted as AdamW: 8 bytes for each trained weight.")
    return "\n".join(lines)


def reward_model_bytes(names: Sequence[str]) -> int:
    """
    Bytes of the reward models on the device, named as for [`~trl_spatial.rewards.load_reward`]. Each is counted as a
    SpatialScore model on Qwen2.5-VL-7B in bfloat16 without its small head, which is also Qwen-Image's text encoder.
    Rules and servers count as 0, and so do functions from modules and GenEval's detectors, whose size is unknown.
    """
    others = re.compile(r"rules$|https?://|geneval(-strict)?:")
    num_models = sum(not others.match(name) and not is_function(name) for name in names)
    if num_models == 0:
        return 0
    encoder = build_component(*load_architecture("Qwen/Qwen-Image")["text_encoder"])
    return num_models * weight_bytes(encoder.requires_grad_(False))
