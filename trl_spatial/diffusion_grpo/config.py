import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .online_config import OnlineConfig
from .runtime.base_config import Ranges, option
from .sde import DYNAMICS, sde_window


@dataclass
class DiffusionGRPOConfig(OnlineConfig):
    r"""
    Configuration class for the [`DiffusionGRPOTrainer`].

    This class includes only the parameters that are specific to GRPO training of a text-to-image model. For a full
    list of training arguments, please refer to [`~online_config.OnlineConfig`] (rollout, rewards),
    [`~runtime.base_config.DiffusionConfig`] (images, evaluation) and the [`~transformers.TrainingArguments`] documentation.
    Note that default values in these classes may differ from those: they follow [Enhancing Spatial Understanding in Image
    Generation via Reward Modeling](https://huggingface.co/papers/2602.24233) and, if it does not specify a value,
    [Flow-GRPO](https://huggingface.co/papers/2505.05470).

    > - `gradient_checkpointing_kwargs`: `{"reuse_activations": True}` keeps the outputs of the transformer's blocks at the trained
    >   steps of a rollout. Checkpointing starts from these in the first update, which thus saves a forward pass and computes
    >   the same gradients. `--estimate` shows how much memory this costs. For families whose prompts all have one length: FLUX.1 and
    >   Stable Diffusion 3.

    Parameters:
        > Parameters that control the rollout

        dynamics (`str`, *optional*, defaults to `"flow_sde"`):
            How to add noise to a denoising step: `"flow_sde"` ([Flow-GRPO](https://huggingface.co/papers/2505.05470)),
            `"dance_sde"` ([DanceGRPO](https://huggingface.co/papers/2505.07818)), `"cps"` ([Coefficients-preserving
            sampling](https://huggingface.co/papers/2509.05952)) or `"precise"`
            ([Precise](https://huggingface.co/papers/2605.23522)). The last two leave no excess noise in the image.
        noise_level (`float`, *optional*, defaults to `0.9`):
            How much noise to add to a step. Typical values are 0.7 … 0.9 for `"flow_sde"`, 0.3 for `"dance_sde"`, 0.8 (at
            most 1) for `"cps"`, 1.5 for `"precise"`.
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that are stochastic and trained; the others are plain ODE steps and cost no
            training. If `None`, all but the last step.
        sde_window_range (`list[int]`, *optional*):
            The steps `[first, last_exclusive]` that contain the window. The window is drawn for every rollout, the same
            for all prompts and devices. If `None`, the first half of the steps.
        > Parameters that control the loss

        epsilon (`float`, *optional*, defaults to `1e-4`):
            Epsilon value for clipping; far smaller than for language models, as log-probs are means over latent elements.
        epsilon_high (`float`, *optional*):
            Upper-bound epsilon value for clipping. If `None`, it defaults to `epsilon`.
        ratio_norm (`bool`, *optional*, defaults to `False`):
            Whether to add the negative bias of the log ratio back and weight the denoising steps equally
            ([GRPO-Guard](https://huggingface.co/papers/2510.22319)). Without this, the upper clip almost never triggers
            after the first update of a rollout.
        kl_mask (`float`, *optional*):
            Instead of clipping, drop the terms in which the policy is further than this KL divergence from the
            old one and would move even further ([Flow-DPPO](https://huggingface.co/papers/2606.11025) uses 1e-5).
            If `None`, ratios are clipped.
        kl_estimator (`str`, *optional*, defaults to `"exact"`):
            What `beta` multiplies. `"exact"`: KL divergence of the Gaussians of a step, whose variance is
            \\( g^2 h \\) with the diffusion \\( g \\) and the step size \\( h \\); `"velocity"`: mean squared difference
            of the velocities, which does not depend on the sampler. Flow-GRPO's code divides by \\( g^2 \\) alone, so a
            beta of the same value is \\( 1 / h \\) times stronger here: 10.4 to 4.7 times, 7.4 on average, for FLUX.1 at 6 steps
            and 512² pixels. Its 0.04 is 0.0054 here, and our 0.01 is 0.074 there. The paper that the defaults follow does not say
            which of the two its 0.01 refers to.
    """

    _checkpointing_options = ("reuse_activations",)
    _ranges: ClassVar[Ranges] = {
        **OnlineConfig._ranges,
        "num_inference_steps": (2, math.inf, None),  # the last step is not trained
        **dict.fromkeys(
            ("epsilon", "epsilon_high", "kl_mask"), (1e-12, 1e6, "a positive number, such as 1e-5 or 1e-4")
        ),
    }

    # Parameters that control the rollout
    dynamics: str = option("flow_sde", "How to add noise to a denoising step.", DYNAMICS)
    noise_level: float = option(0.9, "How much noise to add to a denoising step.")
    sde_window_size: int | None = option(
        None, "Number of consecutive steps that are stochastic and trained. If `None`, all but the last step."
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "The steps `first last_exclusive` that contain the window. If `None`, the first half of the steps."
        },
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'With `{"reuse_activations": true}`, checkpointing starts from activations that the rollout has kept, which '
            "saves a forward pass per trained image and step and costs memory. For FLUX.1 and Stable Diffusion 3."
        },
    )

    # Parameters that control the loss
    epsilon: float = option(1e-4, "Epsilon value for clipping.")
    epsilon_high: float | None = option(
        None, "Upper-bound epsilon value for clipping. If not specified, it defaults to `epsilon`."
    )
    ratio_norm: bool = option(False, "Whether to add the negative bias of the log ratio back (GRPO-Guard).")
    kl_mask: float | None = option(
        None,
        "Instead of clipping, drop terms that moved further than this KL divergence and move further away (Flow-DPPO).",
    )
    kl_estimator: str = option(
        "exact",
        "KL divergence of the Gaussians of a step, or mean squared difference of the velocities.",
        ["exact", "velocity"],
    )

    @property
    def reuses_activations(self) -> bool:
        """Whether the first update on a rollout takes the outputs of the transformer's blocks from it."""
        options = self.gradient_checkpointing_kwargs
        return isinstance(options, dict) and options.get("reuse_activations", False)

    @property
    def num_trained_steps(self) -> int:
        """Number of denoising steps of an image that are trained."""
        return self.sde_window_size or self.num_inference_steps - 1

    @property
    def needs_old_means(self) -> bool:
        """Whether the loss needs the means of the old policy in addition to its log-probs."""
        return self.ratio_norm or self.kl_mask is not None

    def _check_fields(self):
        super()._check_fields()
        self._check_sampling_fields()
        if self.ratio_norm and self.kl_mask is not None:
            raise ValueError(
                f"`ratio_norm` is {self.ratio_norm} and `kl_mask` is {self.kl_mask}. One corrects the ratio for "
                "clipping, the other replaces clipping: use only one of them."
            )

        if self.reuses_activations and (self.torch_compile or not self.gradient_checkpointing):
            raise ValueError(
                f"`gradient_checkpointing_kwargs` is {self.gradient_checkpointing_kwargs} with `gradient_checkpointing` "
                f"{self.gradient_checkpointing} and `torch_compile` {self.torch_compile}. Activations of a rollout can only be reused "
                "with checkpointing and without compilation. Change those, or leave it `None`."
            )

    def _check_sampling_fields(self):
        highest = 1 if self.dynamics == "cps" else 10
        if not 0 < self.noise_level <= highest:
            raise ValueError(
                f"`noise_level` is {self.noise_level} with `dynamics` {self.dynamics!r}. Use a number above 0 (at 0 there is "
                f"no policy gradient) and at most {highest}."
            )
        if self.sde_window_size is None:
            if self.sde_window_range is not None:
                raise ValueError(
                    f"`sde_window_range` is {self.sde_window_range} but `sde_window_size` is None. Set the size of "
                    "the window, such as 2, or leave both `None` to train all steps but the last."
                )
            return
        try:
            sde_window(
                self.num_inference_steps, self.sde_window_size, self.sde_window_range, seed=self.seed, rollout_index=0
            )
        except ValueError as error:
            raise ValueError(
                f"`sde_window_size` is {self.sde_window_size} and `sde_window_range` is {self.sde_window_range} with "
                f"`num_inference_steps` {self.num_inference_steps}. {error}"
            ) from None
