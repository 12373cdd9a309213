"""What a GRPO recipe takes at true size, phase by phase, in the code of the trainer itself."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.true_size.fakes import Counts, like_cuda, make_fake
from trl_spatial import DiffusionGRPOTrainer
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies import SamplingOptions
from trl_spatial.diffusion_grpo.policies.base import NEGATIVE_PREFIX
from trl_spatial.diffusion_grpo.rollout import sample_rollout
from trl_spatial.diffusion_grpo.runtime.architectures import build_policy, load_architecture
from trl_spatial.diffusion_grpo.runtime.buffer import TrainingStep
from trl_spatial.generation.seeds import image_generator
from trl_spatial.scripts import grpo


RECIPES = Path(__file__).parents[2] / "recipes"


def parse(recipe: str, output_dir: Path) -> tuple[Any, Any, Any]:
    """The arguments of a recipe as on a GPU."""
    options = "--dataset none --use_cpu --bf16 true --report_to none --eval_strategy no --load_best_model_at_end false"
    return grpo.make_parser().parse_args_and_config(
        [*options.split(), "--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(output_dir)]
    )


class TrueSize:
    """A trainer of a recipe on fake tensors."""

    def __init__(self, recipe: str, output_dir: Path):
        _, model_args, self.args = parse(recipe, output_dir)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        architecture = load_architecture(model_args.model_name_or_path)
        pipeline = build_policy(architecture, max_sequence_length=self.args.max_sequence_length).pipeline
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                make_fake(component, self.mode)
        with self.mode:
            pipeline.transformer.add_adapter(
                attention_lora_config(rank=model_args.lora_r, alpha=model_args.lora_alpha)
            )
        self.trainer: Any = DiffusionGRPOTrainer(pipeline, lambda prompts, images: [0.0] * len(images), self.args)
        self.policy, self.model = self.trainer.policy, self.trainer.model
        if self.args.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()

    def embeds(self, num_images: int) -> dict[str, torch.Tensor]:
        """Embeddings of the longest prompts, those of the negative prompt among them."""
        found = {}
        for name, shape in self.policy.embed_shapes(num_images).items():
            if name.endswith("mask"):
                found[name] = torch.ones(shape, dtype=torch.long)
            else:
                with self.mode:
                    found[name] = torch.empty(shape, dtype=torch.bfloat16)
        if self.policy.negative_prompt(self.trainer._options) is None:
            return found
        return found | {f"{NEGATIVE_PREFIX}{name}": tensor for name, tensor in found.items()}

    def training_step(self) -> TrainingStep:
        num_images = self.args.per_device_train_batch_size
        generators = [image_generator(0, image) for image in range(num_images)]
        shape = self.policy.prepare_latents(generators, self.trainer._options).shape
        with self.mode:
            latents, next_latents, advantages = torch.empty(shape), torch.empty(shape), torch.empty(num_images)
        return TrainingStep(self.embeds(num_images), 0, latents, next_latents, advantages, True, None, None)

    def sample(self, num_images: int, options: SamplingOptions, num_trained: int) -> list[dict[str, int]]:
        """Counts of a velocity, in sampling with `num_trained` stochastic steps and a last one, and of decoding."""
        embeds, sigmas = self.embeds(num_images), self.trainer._sigmas[: num_trained + 2]
        generators = [image_generator(0, image) for image in range(num_images)]
        parts: list[dict[str, int]] = []
        self.model.eval()
        with Counts(nn.ModuleList([self.model, self.policy.vae])) as counts:
            handle = self.policy.vae.decoder.register_forward_pre_hook(
                lambda *_: None if parts else parts.append(counts.take())
            )
            with self.trainer.accelerator.autocast():
                sample_rollout(
                    self.policy, self.model, embeds, generators, options, sigmas=sigmas,
                    trained_steps=tuple(range(num_trained)), noise_level=self.args.noise_level,
                    dynamics=self.args.dynamics, batch_size=num_images,
                )  # fmt: skip
            handle.remove()
        for name in ("flops", "cast_bytes", "num_attentions"):  # of one velocity
            parts[0][name] //= num_trained + 1
        return [part | {"images": num_images} for part in (*parts, counts.take())]

    def reference(self) -> dict[str, int]:
        step = self.training_step()
        with Counts(self.model) as counts:
            self.trainer._score_reference(step)
        return counts.take() | {"images": len(step.latents)}

    def train(self) -> dict[str, int]:
        """Counts of the loss, the reference among it, and its gradient."""
        step = self.training_step()
        self.model.train()
        with Counts(self.model) as counts:
            self.trainer.compute_loss(self.model, step).backward()
        return counts.take() | {"images": len(step.latents)}


def measure_generator(recipe: str, output_dir: Path) -> dict[str, dict[str, int]]:
    """Counts of the phases of a run. Those of training are without the reference."""
    with like_cuda():
        true_size = TrueSize(recipe, output_dir)
        trainer, args = true_size.trainer, true_size.args
        sample, decode = true_size.sample(args.sampling_batch_size, trainer._options, 1)
        eval_sample, eval_decode = true_size.sample(args.eval_sampling_batch_size, trainer._eval_options, 0)
        reference, train = true_size.reference(), true_size.train()
    for name in ("flops", "cast_bytes", "num_attentions"):
        train[name] -= reference[name]
    for name, weight in true_size.model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
    return {
        "sample": sample,
        "decode": decode,
        "reference": reference,
        "train": train,
        "evaluate: sample": eval_sample,
        "evaluate: decode": eval_decode,
    }
