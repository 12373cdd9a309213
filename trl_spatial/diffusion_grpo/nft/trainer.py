from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..losses import velocity_kl, velocity_ratio
from ..online_trainer import OnlineTrainer
from ..rollout import Rollout
from ..runtime import checkpointing
from ..runtime.ema import EMA
from ..runtime.monitoring import few_groups_warnings
from .buffer import FinalLatentsBuffer, NoisyImages
from .config import DiffusionNFTConfig
from .losses import nft_loss


OLD_POLICY_WEIGHTS = "old_policy.safetensors"


class OldPolicy(EMA):
    """The policy that draws the images: an average of the trained weights whose decay rises linearly over `warmup` updates."""

    def __init__(self, module: torch.nn.Module, decay: float, *, every: int, warmup: int):
        super().__init__(module, decay, every=every)
        self.warmup = warmup

    def _current_decay(self) -> float:
        return self.decay * min(1.0, self.num_updates / max(self.warmup, 1))


class DiffusionNFTTrainer(OnlineTrainer):
    """
    Trainer for online reinforcement learning of text-to-image models with
    [DiffusionNFT](https://huggingface.co/papers/2509.16117), with the filter for the best and worst images of [Enhancing Spatial
    Understanding in Image Generation via Reward Modeling](https://huggingface.co/papers/2602.24233).

    Images are drawn without noise, as in evaluation, and only their final latents are kept. Training mixes them with noise
    again and moves the policy towards good images and away from bad ones. It needs no probabilities, so it can train on any number
    of noise levels, and no step has to be stochastic. The old policy, which draws the images, is an average of the
    trained weights, kept in addition to them: it is saved in checkpoints but not exported.

    This class is a [`~transformers.Trainer`] and inherits all of its attributes and methods. Its arguments are those of
    [`DiffusionGRPOTrainer`], with a [`DiffusionNFTConfig`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_spatial import DiffusionNFTConfig, DiffusionNFTTrainer, SpatialScore
    >>> from trl_spatial.diffusion_grpo import attention_lora_config

    >>> trainer = DiffusionNFTTrainer(
    ...     pipeline="black-forest-labs/FLUX.1-dev",
    ...     reward_funcs=SpatialScore.from_pretrained("SpatialScore-7B"),
    ...     args=DiffusionNFTConfig("FLUX.1-dev-NFT"),
    ...     train_dataset=Dataset.from_dict({"prompt": ["a cat to the left of a dog"]}),
    ...     peft_config=attention_lora_config(rank=32, alpha=64),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["diffusion-nft", *OnlineTrainer._tag_names]
    _method = (
        "Trained by online reinforcement learning ([DiffusionNFT](https://huggingface.co/papers/2509.16117)): the model draws "
        "groups of images, reward functions score them, and training moves it towards the better ones and away from the worse."
    )
    _citation = """\
@article{zheng2025diffusionnft,
  title   = {{DiffusionNFT: Online Diffusion Reinforcement with Forward Process}},
  author  = {Zheng, Kaiwen and others},
  journal = {arXiv preprint arXiv:2509.16117},
  year    = {2025}
}"""
    _config_class = DiffusionNFTConfig
    _buffer_class = FinalLatentsBuffer
    _run_suffix = "NFT"
    _rollout_arguments = (*OnlineTrainer._rollout_arguments, "num_noise_levels")
    _counted = (*OnlineTrainer._counted, "num_old_policy_passes")

    def _set_up(self) -> None:
        self.old_policy = OldPolicy(
            self.model,
            self.args.old_policy_decay,
            every=self.args.num_updates_per_rollout,
            warmup=self.args.old_policy_warmup,
        )

    def _setup_warnings(self) -> list[str]:
        return few_groups_warnings(self._num_groups_per_update)

    def _on_update(self) -> None:
        super()._on_update()
        self.old_policy.step()

    def _sampling_policy(self) -> AbstractContextManager:
        return self.old_policy.applied()

    def _make_buffer(
        self, rollout_index: int, rollout: Rollout, kept: torch.Tensor, **common: Any
    ) -> FinalLatentsBuffer:
        args, latents = self.args, rollout.final_latents
        return FinalLatentsBuffer(
            latents=latents[kept.to(latents.device)],
            sigmas=self._sigmas[:-1].to(latents.device),
            num_levels=args.num_trained_levels,
            seed=args.seed,
            rollout_index=rollout_index,
            first=args.process_index * len(kept),
            **common,
        )

    def compute_loss(self, model, inputs: NoisyImages, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch at one noise level of each image."""
        args, num_images = self.args, len(inputs.latents)
        # These come first: no weight may change between the policy's forward and its backward.
        reference = None
        if args.beta > 0:
            with self._reference_policy():
                reference = self._predict(self.model, inputs)
            self._count_passes("reference", num_images)
        with self.old_policy.applied(), torch.no_grad():
            old_velocity = self._predict(self.model, inputs)
        self._count_passes("old_policy", num_images)
        velocity = self._predict(model, inputs)
        # forward, a second time with checkpointing, and backward
        self._count_passes("policy", (3 if args.gradient_checkpointing else 2) * num_images)

        output = nft_loss(velocity, old_velocity, inputs.targets, inputs.sigmas, inputs.advantages, args.mixing)
        loss = output.loss  # (batch_size,)
        metrics = {"old_policy_distance": velocity_kl(velocity, old_velocity)}
        if reference is not None:
            metrics["kl"] = velocity_kl(velocity, reference)  # (batch_size,)
            metrics["velocity_ratio"] = velocity_ratio(velocity, reference)
            loss = loss + args.beta * metrics["kl"]
        self._metrics.add_per_image(metrics)
        return (loss.mean(), output) if return_outputs else loss.mean()

    def _predict(self, model: torch.nn.Module, inputs: NoisyImages) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.policy.predict_velocity(model, inputs.latents, inputs.sigmas, inputs.embeds, self._options)

    def _save_training_state(self, folder: Path) -> None:
        super()._save_training_state(folder)
        is_writer = self.args.should_save
        if is_writer or self.is_fsdp_enabled:
            checkpointing.save_average(self.old_policy, folder / OLD_POLICY_WEIGHTS, is_writer=is_writer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpointing.load_average(self.old_policy, Path(resume_from_checkpoint) / OLD_POLICY_WEIGHTS)

    def _card_settings(self) -> dict[str, Any]:
        args = self.args
        return super()._card_settings() | {
            "trained noise levels": f"{args.num_trained_levels} of {args.num_inference_steps}",
            "mixing": args.mixing,
            "decay of the old policy": args.old_policy_decay,
        }
