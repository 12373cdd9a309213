"""What a recipe of a generator takes at true size, phase by phase, in the code of the trainer itself."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.true_size.fakes import Counts, like_cuda, make_fake
from trl_spatial import DiffusionDPOTrainer, DiffusionGRPOTrainer, DiffusionNFTTrainer
from trl_spatial.diffusion_grpo.policies import SamplingOptions
from trl_spatial.diffusion_grpo.rollout import Rollout, sample_rollout
from trl_spatial.diffusion_grpo.runtime.activations import RolloutActivations, reusing
from trl_spatial.diffusion_grpo.runtime.architectures import build_policy, load_architecture
from trl_spatial.generation.seeds import image_generator
from trl_spatial.scripts import dpo, grpo, nft


RECIPES = Path(__file__).parents[2] / "recipes"
WITHOUT_NOISE = {"trained_steps": (), "noise_level": 0.0, "dynamics": "flow_sde"}


class TrueSize:
    """A trainer of a recipe on fake tensors."""

    def __init__(self, recipe: str, output_dir: Path, *options: str):
        _, model_args, self.args = parse(recipe, output_dir, "no", *options)  # there is no dataset
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        architecture = load_architecture(model_args.model_name_or_path)
        pipeline = build_policy(architecture, max_sequence_length=self.args.max_sequence_length).pipeline
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                make_fake(component, self.mode)
        with self.mode:
            pipeline.transformer.add_adapter(model_args.peft_config)
        self.method = method_of(recipe)
        self.trainer: Any = self.method.make_trainer(pipeline=pipeline, args=self.args)
        self.policy, self.model = self.trainer.policy, self.trainer.model
        self.policy.encode_prompt = self.encode_prompt
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()  # as the trainer does it
        self.reached: set[str] = set()  # weights that have got a gradient

    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of the longest prompts."""
        found = {}
        for name, shape in self.policy.embed_shapes(len(prompts)).items():
            found[name] = torch.ones(shape, dtype=torch.long) if name.endswith("mask") else self.empty(*shape)
        return found

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def weights(self) -> dict[str, int]:
        """Bytes of all weights, by what `--estimate` calls them."""
        weights = list(self.model.parameters())
        found = {
            "frozen weights": [*(weight for weight in weights if not weight.requires_grad), *self.model.buffers()],
            "trained weights": [weight for weight in weights if weight.requires_grad],
            "average of the weights": self.trainer.ema.weights.values(),
            "VAE": [*self.policy.vae.parameters(), *self.policy.vae.buffers()],
            "text encoders": [weight for encoder in self.policy.encoders for weight in encoder.parameters()],
        }
        if self.method is METHODS["nft"]:
            found["old policy"] = self.trainer.old_policy.weights.values()
        return {part: sum(tensor.nbytes for tensor in tensors) for part, tensors in found.items()}

    def sample(
        self, num_images: int, options: SamplingOptions, policy: Callable[[], AbstractContextManager], **sampler: Any
    ) -> list[dict[str, int]]:
        """Counts of a velocity, in sampling with all trained steps and a last one, and of decoding."""
        num_steps = len(sampler["trained_steps"]) + 1
        embeds = self.trainer.prompt_cache.get(["a cube"] * num_images)
        generators = [image_generator(0, image) for image in range(num_images)]
        parts: list[dict[str, int]] = []
        self.model.eval()
        with self.count() as counts:
            handle = self.policy.vae.decoder.register_forward_pre_hook(
                lambda *_: None if parts else parts.append(counts.take())
            )
            with policy(), self.trainer.accelerator.autocast():
                sample_rollout(
                    self.policy, self.model, embeds, generators, options,
                    sigmas=self.policy.prepare_sigmas(options)[: num_steps + 1], batch_size=num_images, **sampler,
                )  # fmt: skip
                parts.append(counts.take())
            handle.remove()
        for name in ("flops", "cast_bytes", "num_attentions"):  # of one velocity
            parts[0][name] //= num_steps
        return [part | {"images": num_images} for part in parts]

    def train(self) -> list[dict[str, int]]:
        """Counts of a batch, of the passes without gradient, and of the loss and its gradient."""
        parts: list[dict[str, int]] = []
        self.model.train()
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:  # gradients are there from the second batch on
                with self.mode:
                    weight.grad = torch.zeros_like(weight)
                weight.register_post_accumulate_grad_hook(lambda _, name=name: self.reached.add(name))
        with self.count() as counts:
            steps = self.method.make_batch(self)
            batch = counts.take()
            handle = self.model.register_forward_hook(
                lambda *_: None if torch.is_grad_enabled() else parts.append(counts.take())
            )
            self.trainer.compute_loss(self.model, steps[0]).backward()
            handle.remove()
            train = counts.take()
        assert parts, "no pass was without gradient"
        reference = {name: sum(part[name] for part in parts) for name in train}
        reference["peak_bytes"] = max(part["peak_bytes"] for part in parts)
        return [part | {"images": len(steps[0].latents)} for part in (batch, reference, train)]

    def train_reusing(self) -> tuple[dict[str, int], list[torch.Tensor]]:
        """Counts of the loss on a batch whose activations the rollout has kept, without its reference, and these."""
        (step, *_), options = self.method.make_batch(self), self.trainer._options
        activations = RolloutActivations(self.model, len(step.latents), 1)

        def predict() -> torch.Tensor:
            return self.policy.predict_velocity(self.model, step.latents, torch.tensor(0.5), step.embeds, options)

        with torch.no_grad(), activations.recording(0, slice(None)):
            predict()
        self.model.train()
        with self.mode:
            for weight in self.model.parameters():
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        with self.count(activations.tensors) as counts:
            with reusing(activations.of(0, slice(None))):
                velocity = predict()
            velocity.mean().backward()
            return counts.take(), activations.tensors

    def count(self, others: Sequence[torch.Tensor] = ()) -> Counts:
        return Counts(nn.ModuleList([self.model, self.policy.vae]), others)


def _rollout_steps(true_size: TrueSize) -> list[Any]:
    """A batch of kept images at all of their trained steps, or noise levels."""
    trainer, num_images = true_size.trainer, true_size.args.per_device_train_batch_size
    num_steps = true_size.args.num_inference_steps  # of which no more are trained on
    generators = [image_generator(0, image) for image in range(num_images)]
    shape = true_size.policy.prepare_latents(generators, trainer._options).shape
    steps = true_size.empty(num_images, num_steps, *shape[1:], dtype=torch.float32)
    log_probs = true_size.empty(num_images, num_steps, dtype=torch.float32)
    final = true_size.empty(*shape, dtype=torch.float32)
    buffer = trainer._make_buffer(
        0, Rollout([], steps, steps, log_probs, final), torch.arange(num_images), prompts=["a cube"] * num_images,
        advantages=torch.zeros(num_images), batch_size=num_images, num_iterations=1, num_batches_on_policy=1,
    )  # fmt: skip
    return buffer.batch_steps(0, trainer.prompt_cache)


def _pairs(true_size: TrueSize) -> list[Any]:
    """A batch of pairs, encoded by the VAE."""
    args = true_size.args
    image = Image.new("RGB", (args.width, args.height))
    pair = {"prompt": "a cube", "chosen": image, "rejected": image, "noise_seeds": (None, None)}
    return [
        true_size.trainer._prepare_inputs([pair | {"row": row} for row in range(args.per_device_train_batch_size)])
    ]


def _reward(prompts: list[str], images: list[Any]) -> list[float]:
    return [0.0] * len(images)


@dataclass(frozen=True)
class Method:
    """What differs between trainings: the command, its trainer, what it trains on, and how it draws that, if it does."""

    script: ModuleType
    make_trainer: Callable[..., Any]
    make_batch: Callable[[TrueSize], list[Any]]
    sampler: Callable[[Any], dict[str, Any]] | None


METHODS = {
    "grpo": Method(
        grpo,
        partial(DiffusionGRPOTrainer, reward_funcs=_reward),
        _rollout_steps,
        lambda args: {"trained_steps": (0,), "noise_level": args.noise_level, "dynamics": args.dynamics},
    ),
    "nft": Method(nft, partial(DiffusionNFTTrainer, reward_funcs=_reward), _rollout_steps, lambda _: WITHOUT_NOISE),
    "dpo": Method(dpo, DiffusionDPOTrainer, _pairs, None),
}


def method_of(recipe: str) -> Method:
    return METHODS[recipe.partition("_")[0]]


def parse(recipe: str, output_dir: Path, eval_strategy: str = "steps", *more: str) -> tuple[Any, Any, Any]:
    """The arguments of a recipe as on a GPU."""
    options = f"--dataset none --use_cpu --bf16 true --report_to none --load_best_model_at_end false --eval_strategy {eval_strategy}"
    config = ["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(output_dir)]
    return method_of(recipe).script.make_parser().parse_args_and_config([*options.split(), *config, *more])


def measure_generator(recipe: str, output_dir: Path) -> dict[str, dict[str, int]]:
    """Counts of the phases of a run, those of training without the passes without gradient, and bytes of the weights."""
    with like_cuda():
        true_size = TrueSize(recipe, output_dir)
        trainer, args, method = true_size.trainer, true_size.args, true_size.method
        phases = {"weights": true_size.weights()}
        if method.sampler is not None:
            phases["sample"], phases["decode"] = true_size.sample(
                args.sampling_batch_size, trainer._options, trainer._sampling_policy, **method.sampler(args)
            )
        phases["evaluate: sample"], phases["evaluate: decode"] = true_size.sample(
            args.eval_sampling_batch_size, trainer._eval_options, trainer.ema.applied, **WITHOUT_NOISE
        )
        batch, phases["reference"], phases["train"] = true_size.train()
        if method.sampler is None:
            phases["encode images"] = batch
    trained = {name for name, weight in true_size.model.named_parameters() if weight.requires_grad}
    assert true_size.reached == trained
    assert all("lora_" in name for name in trained)
    return phases
