"""Rows of the generators: the recipes' updates of a text-to-image model, with one lever at a time."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback

from trl_spatial import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.runtime.memory import GIB, MemoryModel
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache

from .clock import clock
from .models import architecture_of, build_pipeline, quantize
from .phases import PhaseTrainer


RECIPES = Path(__file__).parents[1]
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Generator:
    """A model of architectures.json, trained by a recipe on prompts of `num_tokens` tokens; `settings` override the recipe's."""

    model: str
    recipe: str
    num_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: str, args: argparse.Namespace, **changes: Any) -> DiffusionGRPOConfig:
        """Returns the recipe's configuration for one group of `args.num_images` images, without evaluating or saving."""
        recipe = yaml.safe_load((RECIPES / self.recipe).read_text(encoding="utf-8"))
        settings = {key: value for key, value in recipe.items() if key not in ("model_name_or_path", "rewards")}
        settings |= {
            "output_dir": folder, "height": args.size, "width": args.size, "num_generations": args.num_images,
            "top_k": args.num_images // 4, "per_device_train_batch_size": args.batch_size, "logging_steps": 1,
            "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none",
            "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        settings |= self.settings | changes
        num_kept = args.num_images if settings["top_k"] is None else 2 * settings["top_k"]
        settings["gradient_accumulation_steps"] = num_kept // args.batch_size
        if args.tiny and settings.get("torch_compile"):
            settings["torch_compile_backend"] = "aot_eager"  # the same graphs without minutes of compilation
        return DiffusionGRPOConfig(**settings)


@dataclass(frozen=True)
class Lever:
    """Differences from the recipe: settings, and how the models run."""

    settings: dict[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    is_offloaded: bool = False
    attention_backend: str | None = None


def measure_training(
    generator: Generator, lever: Lever, args: argparse.Namespace, device: torch.device, report: Report
) -> None:
    """Measures updates, with random embeddings in place of the text encoders, which run once per prompt."""
    with tempfile.TemporaryDirectory() as folder:
        config = generator.config(folder, args, max_steps=1 + args.repeats, **lever.settings)
        pipeline = build_pipeline(generator.model, device, has_encoders=False, is_tiny=args.tiny)
        if lever.quantization is not None:
            quantize(pipeline.transformer, lever.quantization, device)
        if lever.attention_backend is not None:
            pipeline.transformer.set_attention_backend(lever.attention_backend)
        trainer = build_trainer(pipeline, config, generator.num_tokens)
        trainer.policy.encode_prompt = lambda prompts: _random_embeds(trainer.policy, prompts)
        if lever.is_offloaded:
            trainer.policy.offload_vae(device)
        trainer.train()
        report(trainer.report(num_warm_up=1))


def measure_update(generator: Generator, args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """
    Measures a real run: text encoders, rollout, reward, reference, update, evaluation at the recipe's size, and a checkpoint that a
    second trainer resumes from. Reports the peak memory of each phase next to the prediction of `--estimate`.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        if args.tiny:
            settings |= {"eval_num_inference_steps": 2, "eval_height": args.size, "eval_width": args.size}
        config = generator.config(folder, args, max_steps=2, **settings)

        def train(config: DiffusionGRPOConfig, resume: bool) -> PhaseTrainer:
            torch.manual_seed(0)  # the same frozen weights in both
            pipeline = build_pipeline(generator.model, device, has_encoders=True, is_tiny=args.tiny)
            trainer = build_trainer(pipeline, config, generator.num_tokens)
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        trainer = train(config, resume=False)
        rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
        report({**trainer.report(num_warm_up=1), "num_evaluations": len(rewards)})
        del trainer
        # Report the estimate before the second run, during which the time may run out.
        model = MemoryModel(architecture_of(generator.model, is_tiny=args.tiny), config, attention_lora_config())
        report({"estimated_gib": {name: size / GIB for name, size in model.estimate().phases.items()}})
        resumed = train(generator.config(folder, args, max_steps=3, **settings), resume=True)
        report({"num_updates_resumed": resumed.state.global_step - 2})


def measure_parts(generator: Generator, args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Measures what the other rows leave out: encoding, with text encoders moved to the device and back, and decoding."""
    from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy

    pipeline = build_pipeline(generator.model, device, has_encoders=True, is_tiny=args.tiny)
    policy = make_policy(pipeline)
    cache = PromptCache(policy, device)
    prompts = iter(f"{_prompt(policy, generator.num_tokens - 4)} {number}" for number in range(100))
    report({"seconds": {"encode": clock(lambda: cache.get([next(prompts)]), device, args.repeats)}})
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    for num_images, size in ((4, args.size), (2, 2 * args.size)):
        options = SamplingOptions(size, size, 6, 1.0)
        latents = policy.prepare_latents([torch.Generator().manual_seed(0)] * num_images, options)
        seconds = clock(lambda: policy.decode_latents(latents, options), device, args.repeats)  # noqa: B023
        report({"seconds": {f"decode {num_images} at {size}²": seconds}})


def build_trainer(pipeline: Any, config: DiffusionGRPOConfig, num_tokens: int) -> PhaseTrainer:
    from trl_spatial.diffusion_grpo.policies import make_policy

    prompt = _prompt(make_policy(pipeline, max_sequence_length=config.max_sequence_length), num_tokens)
    trainer = PhaseTrainer(
        pipeline=pipeline,
        reward_funcs=spread,
        args=config,
        train_dataset=[{"prompt": prompt}] * 4,
        eval_dataset=[{"prompt": prompt}] * config.per_device_eval_batch_size,
        peft_config=attention_lora_config(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def spread(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    """Returns rewards that differ within a group, whatever the images show."""
    return [float(number * 7 % 5) + number / 100 for number in range(len(images))]


def _prompt(policy: Any, num_tokens: int) -> str:
    """Returns a prompt of `num_tokens` tokens; "red" is one token."""
    return " ".join(["red"] * (1 + num_tokens - policy.count_tokens("red")))


def _random_embeds(policy: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Returns random embeddings of the text encoders' shapes; a family with a mask does not pad a single prompt."""
    (prompt,) = prompts
    shapes = policy.embed_shapes(1)
    is_padded = not any(name.endswith("mask") for name in shapes)
    embeds = {}
    for name, shape in shapes.items():
        if not is_padded:
            shape = (1, policy.count_tokens(prompt), *shape[2:])
        embeds[name] = (
            torch.ones(shape, dtype=torch.long) if name.endswith("mask") else torch.randn(shape, dtype=torch.bfloat16)
        )
    return embeds
