from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ...generation.seeds import image_generator
from ..losses import velocity_ratio
from ..reward_functions import RewardFunction, RewardFunctions
from ..runtime.base_trainer import DiffusionTrainer, Rows
from .config import DiffusionDPOConfig
from .losses import diffusion_dpo_loss
from .pairs import ENTRIES, PreferencePairs, collate_pairs


@dataclass
class NoisyPairs:
    """
    A batch of `n` noisy pairs on the training device, first the chosen images and then the rejected ones.

    Args:
        embeds (`dict[str, torch.Tensor]`):
            Embeddings of the prompts, `2 * n` rows.
        latents (`torch.Tensor` of shape `(2 * n, image_seq_len, num_channels)`):
            Latents of the images, mixed with noise.
        sigmas (`torch.Tensor` of shape `(2 * n,)`):
            Noise level, the same for the images of a pair.
        targets (`torch.Tensor` of shape `(2 * n, image_seq_len, num_channels)`):
            The true velocity, noise minus image.
    """

    embeds: dict[str, torch.Tensor]
    latents: torch.Tensor
    sigmas: torch.Tensor
    targets: torch.Tensor


class DiffusionDPOTrainer(DiffusionTrainer):
    """
    Trainer for offline alignment of text-to-image models with preferences, using
    [Diffusion-DPO](https://huggingface.co/papers/2311.12908) for flow matching.

    No images are sampled: a pair takes one policy pass and one reference pass for each of its images, at a noise level that is
    drawn each time from those that the sampler visits. The noise itself stays the same for an image, as in
    [PNAPO](https://huggingface.co/papers/2605.09433): the noise that the image was drawn from, if the dataset records it for both
    images of the pair, and otherwise one noise per row, the same for both. Velocities are without classifier-free guidance.

    This class is a [`~transformers.Trainer`] and inherits all of its attributes and methods. Its logs use the names of
    [`~trl.DPOTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_spatial import DiffusionDPOConfig, DiffusionDPOTrainer
    >>> from trl_spatial.diffusion_grpo import attention_lora_config

    >>> trainer = DiffusionDPOTrainer(
    ...     pipeline="black-forest-labs/FLUX.1-dev",
    ...     args=DiffusionDPOConfig("FLUX.1-dev-DPO"),
    ...     train_dataset=load_dataset("ORG/SpatialReward", split="train"),
    ...     peft_config=attention_lora_config(rank=32, alpha=64),
    ... )
    >>> trainer.train()
    ```

    Args:
        pipeline (`str` or [`~diffusers.DiffusionPipeline`]):
            Pipeline whose transformer is trained, or its name; see [`DiffusionGRPOTrainer`].
        args ([`DiffusionDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or `list[dict]`):
            Preference dataset to train on: the columns `prompt`, `chosen` and `rejected`, and, to keep the noise of each
            image, `chosen_recipe` and `rejected_recipe`, as `trl_spatial data build` writes them.
        eval_dataset ([`~datasets.Dataset`], `list[dict]` or a `dict` of them, *optional*):
            Prompts to draw images for in evaluation, with the columns that `eval_reward_funcs` needs.
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions that score the evaluation images. None of them is trained on.
        callbacks, optimizers, peft_config:
            See [`DiffusionGRPOTrainer`]. Adapters are needed: the reference is the transformer without them.
    """

    _tag_names = ["diffusion-dpo", "dpo", *DiffusionTrainer._tag_names]
    _method = (
        "Trained on preference pairs of images ([Diffusion-DPO](https://huggingface.co/papers/2311.12908) for flow matching): the "
        "velocities move towards the preferred image and away from the other."
    )
    _citation = """\
@article{wallace2023diffusion,
  title   = {{Diffusion Model Alignment Using Direct Preference Optimization}},
  author  = {Wallace, Bram and others},
  journal = {arXiv preprint arXiv:2311.12908},
  year    = {2023}
}"""
    _counted = (*DiffusionTrainer._counted, "num_trained_images")
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the number of pairs of the whole update

    def __init__(
        self,
        pipeline: str | DiffusionPipeline,
        args: DiffusionDPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        eval_reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = pipeline if isinstance(pipeline, str) else pipeline.config.get("_name_or_path", "")
            args = DiffusionDPOConfig(f"{name.split('/')[-1]}-DPO".removeprefix("-"))
        elif not isinstance(args, DiffusionDPOConfig):
            raise TypeError(f"`args` must be a `DiffusionDPOConfig`, got `{type(args).__name__}`.")
        super().__init__(
            pipeline=pipeline,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            eval_reward_functions=None if eval_reward_funcs is None else RewardFunctions(eval_reward_funcs, None),
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if train_dataset is not None:
            self.train_dataset = self._pairs
        self.data_collator = collate_pairs
        self._signature_columns = list(ENTRIES)  # kept by `remove_unused_columns`
        self._sigmas = self.policy.prepare_sigmas(self._options)[:-1]  # (eval_num_inference_steps,), without 0

    def _check_train_dataset(self, dataset: Rows) -> None:
        super()._check_train_dataset(dataset)
        self._pairs = PreferencePairs(dataset, self.policy.pipeline_class, self._options)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Counts the pairs of an update over all processes, and announces its prompts, to be encoded together."""
        self.prompt_cache.expect([pair["prompt"] for batch in batch_samples for pair in batch])
        num_pairs = sum(len(batch) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(num_pairs, device=device)).sum()

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> NoisyPairs:
        """Encodes a batch of pairs from [`PreferencePairs`] and mixes it with noise."""
        device = self.args.device
        with self._timer.phase("encode"):
            embeds = self.prompt_cache.get([pair["prompt"] for pair in inputs] * 2)
            images = [pair[column] for column in ("chosen", "rejected") for pair in inputs]
            latents = self.policy.encode_images(images).to(device)  # (2 * n, image_seq_len, num_channels)
        generators = [self._noise_generator(pair, side) for side in (0, 1) for pair in inputs]
        noise = self.policy.prepare_latents(generators, self._options).to(device)
        steps = [self._draw_step(pair["row"]) for pair in inputs] * 2
        sigmas = self._sigmas[steps].to(device)  # (2 * n,)
        mixed = torch.lerp(latents, noise, sigmas[:, None, None])
        return NoisyPairs(embeds, mixed, sigmas, noise - latents)

    def _noise_generator(self, pair: dict[str, Any], side: int) -> torch.Generator:
        seed = pair["noise_seeds"][side]
        return image_generator(self.args.seed, pair["row"]) if seed is None else torch.Generator().manual_seed(seed)

    def _draw_step(self, row: int) -> int:
        """Draws the denoising step whose noise level a pair gets in this update, independent of its batch."""
        generator = image_generator(self.args.seed, row, self.state.global_step)
        return int(torch.randint(len(self._sigmas), (), generator=generator))

    def compute_loss(self, model, inputs: NoisyPairs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch of pairs."""
        num_images = len(inputs.latents)
        with self._timer.phase("train"):
            # The reference comes first: no adapter may be switched between the policy's forward and its backward.
            with self._reference_policy():
                reference = self._predict(self.model, inputs)
            velocity = self._predict(model, inputs)
        self._metrics.totals["num_trained_images"] += num_images
        self._count_passes("reference", num_images)
        # forward, a second time with checkpointing, and backward
        self._count_passes("policy", (3 if self.args.gradient_checkpointing else 2) * num_images)

        chosen_velocity, rejected_velocity = velocity.chunk(2)  # (n, image_seq_len, num_channels), like those below
        chosen_reference, rejected_reference = reference.chunk(2)
        chosen_target, rejected_target = inputs.targets.chunk(2)
        output = diffusion_dpo_loss(
            chosen_velocity,
            chosen_reference,
            chosen_target,
            rejected_velocity,
            rejected_reference,
            rejected_target,
            self.args.beta,
        )
        self._metrics.add_per_image(
            {
                "rewards/chosen": output.chosen_rewards,
                "rewards/rejected": output.rejected_rewards,
                "rewards/accuracies": output.chosen_rewards > output.rejected_rewards,
                "rewards/margins": output.chosen_rewards - output.rejected_rewards,
                "velocity_ratio": velocity_ratio(velocity, reference),
            }
        )
        if num_items_in_batch is None:
            loss = output.loss.mean()
        else:  # batches differ in size, but every pair counts the same; gradients are averaged over the processes
            loss = output.loss.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, output) if return_outputs else loss

    def _predict(self, model: torch.nn.Module, inputs: NoisyPairs) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.policy.predict_velocity(model, inputs.latents, inputs.sigmas, inputs.embeds, self._options)

    def _card_settings(self) -> dict[str, Any]:
        args = self.args
        settings = super()._card_settings()
        settings["preference strength (beta)"] = settings.pop("KL coefficient")
        num_pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "pairs": None if self.train_dataset is None else len(self.train_dataset),
            "pairs per update": num_pairs,
        } | settings
