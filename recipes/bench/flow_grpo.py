"""How much does a rollout with its updates cost, compared with Flow-GRPO's own loop?

    python recipes/bench/flow_grpo.py

Reimplements the loop of Flow-GRPO (https://huggingface.co/papers/2505.05470) for the same FLUX with 21 million random parameters
and the same batches: it encodes every batch of prompts, keeps the sampler's log-probs as those of the old policy, trains on all
images at all steps but the last, scores the reference in a separate pass, and uses diffusers' checkpointing. Runs of the two
alternate in one process and are compared by processor time. "equal work" is one update per rollout with KL divergence, which is
what our trainer does without filter and window; in "two updates, no KL", the second update needs an old policy.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tiny")]

from flux import FLUX_20M, build_flux_pipeline
from levers import NUM_IMAGES, NUM_STEPS, TOP_K, brightness, choose_rows, measure

from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy
from trl_spatial.diffusion_grpo.sde import sde_step
from trl_spatial.generation.seeds import image_generator


BATCH_SIZE = 3  # images per forward pass, in rollouts and in training
NOISE_LEVEL, EPSILON, LEARNING_RATE = 0.9, 1e-4, 3e-4


@dataclass(frozen=True)
class Row:
    """Updates per rollout and the KL coefficient, for both loops; `levers` are settings of ours alone."""

    num_updates: int
    beta: float
    levers: dict[str, Any]


REUSED = {"gradient_checkpointing_kwargs": {"reuse_activations": True}}
ROWS = {
    "equal work": Row(1, 0.01, {"top_k": None}),
    "two updates, no KL": Row(2, 0.0, {"top_k": None}),
    "filter": Row(1, 0.01, {"top_k": TOP_K}),
    "window of 2": Row(1, 0.01, {"top_k": None, "sde_window_size": 2}),
    "filter and window": Row(1, 0.01, {"top_k": TOP_K, "sde_window_size": 2}),
    "equal work, activations reused": Row(1, 0.01, {"top_k": None, **REUSED}),
    "two updates, no KL, activations reused": Row(2, 0.0, {"top_k": None, **REUSED}),
    "filter, window, activations reused": Row(1, 0.01, {"top_k": TOP_K, "sde_window_size": 2, **REUSED}),
}


class FlowGRPO:
    """Flow-GRPO's loop, on one prompt per rollout."""

    def __init__(self, row: Row, args: argparse.Namespace):
        sizes: dict[str, Any] = FLUX_20M if args.model == "20m" else {}
        self.policy = make_policy(build_flux_pipeline(**sizes), max_sequence_length=32)
        self.row, self.options = row, SamplingOptions(args.image_size, args.image_size, NUM_STEPS, 3.5)
        self.sigmas = self.policy.prepare_sigmas(self.options)
        self.transformer = self.policy.transformer
        for component in self.policy.pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
        self.transformer.add_adapter(attention_lora_config())
        self.transformer.enable_gradient_checkpointing()
        self.weights = [weight for weight in self.transformer.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, LEARNING_RATE, weight_decay=1e-4)

    def rollout_and_updates(self) -> None:
        batches, images = [], []
        self.transformer.eval()
        for start in range(0, NUM_IMAGES, BATCH_SIZE):
            generators = [image_generator(0, start + index) for index in range(BATCH_SIZE)]
            batch, drawn = self.sample(generators)
            batches.append(batch)
            images += drawn
        rewards = torch.tensor(brightness([], images))
        advantages = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)).clamp(-5, 5).split(BATCH_SIZE)
        self.transformer.train()
        per_update = len(batches) // self.row.num_updates
        for number, (batch, advantage) in enumerate(zip(batches, advantages, strict=True), start=1):
            for step in range(NUM_STEPS - 1):
                (self.loss(step, advantage, *batch) / (per_update * (NUM_STEPS - 1))).backward()
            if number % per_update == 0:
                torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self, generators: list[torch.Generator]) -> tuple[tuple[Any, ...], list[Any]]:
        """Returns (prompt embeddings, latents before every step and at the end, log-probs of every step), and the images."""
        embeds = self.policy.encode_prompt(["a red circle"] * len(generators))
        latents, log_probs = [self.policy.prepare_latents(generators, self.options)], []
        for step in range(NUM_STEPS):
            noise_level = NOISE_LEVEL if step < NUM_STEPS - 1 else 0.0
            output = self.step(step, embeds, latents[-1], noise_level, generator=generators)
            latents.append(output.next_latents)
            log_probs.append(output.log_probs)
        return (embeds, latents, log_probs), self.policy.decode_latents(latents[-1], self.options)

    def step(self, step: int, embeds: Any, latents: torch.Tensor, noise_level: float, **kwargs: Any) -> Any:
        velocity = self.policy.predict_velocity(self.transformer, latents, self.sigmas[step], embeds, self.options)
        first = self.sigmas[1] if step == 0 else None
        return sde_step(
            velocity, latents, self.sigmas[step], self.sigmas[step + 1], noise_level, sigma_max=first, **kwargs
        )

    def loss(self, step: int, advantages: torch.Tensor, embeds: Any, latents: Any, log_probs: Any) -> torch.Tensor:
        scored = self.step(step, embeds, latents[step], NOISE_LEVEL, next_latents=latents[step + 1])
        ratio = (scored.log_probs - log_probs[step]).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if self.row.beta == 0:
            return loss
        self.transformer.disable_adapters()
        with torch.no_grad():
            reference = self.step(step, embeds, latents[step], NOISE_LEVEL, next_latents=latents[step + 1])
        self.transformer.enable_adapters()
        kl = (scored.mean - reference.mean).square().flatten(1).mean(1) / (2 * scored.std.square())
        return loss + self.row.beta * kl.mean()


def measure_flow_grpo(row: Row, args: argparse.Namespace) -> float:
    """Returns the processor seconds of a rollout with its updates, after a first one that warms up."""
    loop = FlowGRPO(row, args)
    loop.rollout_and_updates()
    start = time.process_time()
    for _ in range(args.num_rollouts):
        loop.rollout_and_updates()
    return (time.process_time() - start) / args.num_rollouts


def measure_ours(row: Row, args: argparse.Namespace) -> float:
    num_kept = NUM_IMAGES if row.levers["top_k"] is None else 2 * TOP_K
    num_batches = num_kept // BATCH_SIZE
    settings = {
        "per_device_train_batch_size": BATCH_SIZE,
        "rollout_batch_size": BATCH_SIZE,
        "steps_per_generation": num_batches,
        "gradient_accumulation_steps": num_batches // row.num_updates,
        "beta": row.beta,
        "ema_decay": 0.0,  # Flow-GRPO's EMA is left out, too
    }
    return measure("flux", settings | row.levers, args)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    args, chosen = choose_rows(argv, ROWS, __doc__, num_rollouts=1)
    torch.set_num_threads(1)
    results = {}
    for name, row in chosen.items():
        pairs = [(measure_ours(row, args), measure_flow_grpo(row, args)) for _ in range(args.repeats)]
        ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        ratios = np.array([a / b for a, b in pairs])
        results[name] = {
            "ours": ours,
            "flow_grpo": theirs,
            "ratio": float(np.median(ratios)),
            "lowest": float(ratios.min()),
            "highest": float(ratios.max()),
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


if __name__ == "__main__":
    main()
