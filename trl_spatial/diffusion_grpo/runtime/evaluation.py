"""Evaluation: images of the same prompts and noise every time, and their rewards."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter

import torch
from accelerate.utils import gather_object
from PIL import Image

from ...generation.drawing import DrawnBatch
from ..policies.base import DiffusionPolicy, SamplingOptions
from ..reward_functions import RewardFunctions
from ..rollout import sample_rollout
from .prompt_cache import PromptCache


@dataclass
class EvaluationOutput:
    """Rewards and images of one process, in the order of their rows."""

    rewards: torch.Tensor  # (n, num_funcs), float32, on the CPU; NaN where a function gave none
    indices: torch.Tensor  # (n,), numbers of the images among those of all processes: row * num_images + image
    prompts: list[str]  # of length n
    images: list[Image.Image]  # those whose number is below `num_kept_images`, for the logs


class PolicyGenerator:
    """
    Draws with a policy by the deterministic sampler: an [`~generation.generators.ImageGenerator`]. The transformer may
    be wrapped for training; `autocast` makes the context of its forward passes, such as `accelerator.autocast`. It runs
    uncompiled: images of another size would leave behind graphs for any size, which are slower in training.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        transformer: torch.nn.Module,
        prompt_cache: PromptCache,
        options: SamplingOptions,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.policy, self.transformer, self.prompt_cache = policy, transformer, prompt_cache
        self.options, self.autocast = options, autocast
        self._sigmas = policy.prepare_sigmas(options)  # (num_inference_steps + 1,)

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        was_training = self.transformer.training
        self.transformer.eval()
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            rollout = sample_rollout(
                self.policy,
                self.transformer,
                self.prompt_cache.get(prompts),
                generators,
                self.options,
                sigmas=self._sigmas,
                trained_steps=(),  # no noise: the ODE sampler
                noise_level=0.0,
                dynamics="flow_sde",
                batch_size=len(prompts),
            )
        self.transformer.train(was_training)
        return rollout.images


def reward_images(
    batches: Iterable[DrawnBatch], reward_functions: RewardFunctions, *, num_kept_images: int = 0
) -> EvaluationOutput:
    """
    Rewards images batch by batch as [`~generation.drawing.draw_rows`] draws them; the columns of their rows go to the
    reward functions. Only the first `num_kept_images` are returned, the others are dropped once they are rewarded. A
    process without images has no batches.
    """
    rewards, indices, prompts, images = [torch.empty(0, len(reward_functions.names))], [], [], []
    for batch in batches:
        columns = {name: [row[name] for row in batch.rows] for name in batch.rows[0]}
        batch_prompts = columns.pop("prompt")
        rewards.append(reward_functions(batch_prompts, batch.images, **columns))
        indices += batch.indices
        prompts += batch_prompts
        images += batch.images[: sum(index < num_kept_images for index in batch.indices)]  # indices ascend
    return EvaluationOutput(torch.cat(rewards), torch.tensor(indices, dtype=torch.long), prompts, images)


def gather_evaluation(output: EvaluationOutput) -> EvaluationOutput:
    """Combines the evaluations of all processes, in the order of the images. All processes have to call this."""
    outputs = gather_object([output])
    indices = torch.cat([output.indices for output in outputs])
    order = indices.argsort()
    prompts = [prompt for output in outputs for prompt in output.prompts]
    # Each process kept the images with the lowest numbers among its own.
    kept = [pair for output in outputs for pair in zip(output.indices.tolist(), output.images, strict=False)]
    return EvaluationOutput(
        rewards=torch.cat([output.rewards for output in outputs])[order],
        indices=indices[order],
        prompts=[prompts[index] for index in order.tolist()],
        images=[image for _, image in sorted(kept, key=itemgetter(0))],
    )
