import math
from dataclasses import dataclass
from typing import ClassVar

from ..online_config import OnlineConfig
from ..runtime.base_config import BELOW_1, Ranges, option


@dataclass
class DiffusionNFTConfig(OnlineConfig):
    r"""
    Configuration class for the [`DiffusionNFTTrainer`].

    This class includes only the parameters that are specific to [DiffusionNFT](https://huggingface.co/papers/2509.16117). For a
    full list of training arguments, please refer to [`~online_config.OnlineConfig`] (rollout, rewards),
    [`~runtime.base_config.DiffusionConfig`] (images, evaluation) and the [`~transformers.TrainingArguments`] documentation.

    Parameters:
        > Parameters that control the loss

        num_noise_levels (`int`, *optional*):
            Number of noise levels at which each kept image is trained on, drawn for each image from those that sampling
            visits. If `None`, all but one of them, as in the paper. It cannot be changed in the middle of a rollout.
        mixing (`float`, *optional*, defaults to `1.0`):
            Share \\( b \\) of the policy in the two velocities that the loss compares with an image, a better and a worse one:
            \\( (1 - b) v_\mathrm{old} + b v \\) and \\( (1 + b) v_\mathrm{old} - b v \\). With smaller values, the policy moves
            further before the loss saturates: the paper's code uses 0.1 and 1.
        old_policy_decay (`float`, *optional*, defaults to `0.5`):
            Decay of the old policy, which draws the images: after every rollout it keeps this share of itself and takes the
            rest from the trained weights. If `0.0`, images are drawn by the trained weights themselves.
        old_policy_warmup (`int`, *optional*, defaults to `500`):
            Number of updates over which that decay rises from 0: learning is fast at first and steadier later.

    > [!NOTE]
    > These parameters have default values different from [`~online_config.OnlineConfig`]:
    > - `beta`: Defaults to `1e-4` instead of `0.01`. The KL divergence is the mean squared difference of the velocities.
    """

    _ranges: ClassVar[Ranges] = {
        **OnlineConfig._ranges,
        "num_noise_levels": (1, math.inf, None),
        "mixing": (1e-3, 10, "a number from 0.001 to 10; 0.1 and 1 are common"),
        "old_policy_decay": (0, BELOW_1, "0 (the trained weights draw) or a number between 0 and 1"),
        "old_policy_warmup": (0, math.inf, None),
    }

    # Parameters whose default values are overridden from DiffusionConfig
    beta: float = option(1e-4, "KL coefficient. If `0.0`, the reference policy is not evaluated.")

    # Parameters that control the loss
    num_noise_levels: int | None = option(
        None,
        "Number of noise levels at which each kept image is trained on. If `None`, all but one of the sampler's.",
    )
    mixing: float = option(
        1.0, "Share of the policy in the two velocities that are compared with an image; the rest is the old policy."
    )
    old_policy_decay: float = option(
        0.5, "Share of itself that the old policy, which draws the images, keeps after each rollout."
    )
    old_policy_warmup: int = option(500, "Number of updates over which that share rises from 0.")

    @property
    def num_trained_levels(self) -> int:
        """Number of noise levels at which an image is trained on: `num_noise_levels`, or its default."""
        return max(self.num_inference_steps - 1, 1) if self.num_noise_levels is None else self.num_noise_levels

    def _check_fields(self):
        super()._check_fields()
        if self.num_trained_levels > self.num_inference_steps:
            raise ValueError(
                f"`num_noise_levels` is {self.num_noise_levels} and `num_inference_steps` is {self.num_inference_steps}. Sampling "
                f"visits one noise level per step: use at most {self.num_inference_steps}."
            )
