"""The families of text-to-image models: a row each, with guidance and without. The policy tests run for every row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from flux import build_flux_pipeline
from qwen_image import build_qwen_image_pipeline
from sd3 import build_sd3_pipeline
from z_image import build_z_image_pipeline

from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_spatial.diffusion_grpo.policies import DiffusionPolicy, SamplingOptions, make_policy


MAX_SEQUENCE_LENGTH = 16


@dataclass(frozen=True)
class Family:
    """
    A family whose tiny pipeline is sampled in one way.

    Args:
        build (`Callable`):
            Builds the pipeline, from a seed if it is given one.
        guidance (`dict`):
            Guidance in our names, for `SamplingOptions` and `DiffusionGRPOConfig`.
        pipeline_guidance (`dict`):
            The same guidance in the names of the pipeline's own call. A negative prompt is also in the options.
    """

    build: Callable[..., Any]
    guidance: dict[str, Any]
    pipeline_guidance: dict[str, Any]

    def options(self, height: int = 32, width: int = 32, num_inference_steps: int = 4) -> SamplingOptions:
        return SamplingOptions(
            height,
            width,
            num_inference_steps,
            negative_prompt=self.pipeline_guidance.get("negative_prompt"),
            **self.guidance,
        )

    def make_policy(self, **kwargs) -> DiffusionPolicy:
        """A policy of its own; keyword arguments go to `build`."""
        return make_policy(self.build(**kwargs), max_sequence_length=MAX_SEQUENCE_LENGTH)


FAMILIES = {
    "flux": Family(build_flux_pipeline, {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
    "flux_unguided": Family(
        partial(build_flux_pipeline, guidance_embeds=False), {"guidance_scale": 3.5}, {"guidance_scale": 3.5}
    ),
    "qwen_image": Family(
        build_qwen_image_pipeline,
        {"guidance_scale": 4.0},
        {"true_cfg_scale": 4.0, "negative_prompt": "a dog"},
    ),
    "qwen_image_unguided": Family(build_qwen_image_pipeline, {"guidance_scale": 1.0}, {"true_cfg_scale": 1.0}),
    "sd3": Family(
        build_sd3_pipeline,
        {"guidance_scale": 4.5},
        {"guidance_scale": 4.5, "negative_prompt": "a dog"},
    ),
    "sd3_unguided": Family(build_sd3_pipeline, {"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    "z_image": Family(
        build_z_image_pipeline,
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "negative_prompt": "a dog"},
    ),
    "z_image_unguided": Family(build_z_image_pipeline, {"guidance_scale": 0.0}, {"guidance_scale": 0.0}),
}
# Each family once
GUIDED = [name for name in FAMILIES if not name.endswith("_unguided")]


@cache
def shared_policy(name: str) -> DiffusionPolicy:
    """The policy of a row, built once. Treat it as read-only."""
    return FAMILIES[name].make_policy()


def brightness(prompts, images, **columns):
    return [float(np.asarray(image, dtype="float64").mean()) for image in images]


def make_small_trainer(name: str, folder: Any, pipeline: Any, peft_config: Any, **kwargs: Any) -> DiffusionGRPOTrainer:
    """A trainer of a row: two updates, each with groups of four small images, of which two are kept."""
    settings = dict(
        num_generations=4, top_k=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, height=24, width=48,
        num_inference_steps=4, max_sequence_length=24, ema_decay=0.0, max_steps=2, save_strategy="no", report_to="none",
        disable_tqdm=True, **FAMILIES[name].guidance,
    )  # fmt: skip
    return DiffusionGRPOTrainer(
        pipeline,
        brightness,
        DiffusionGRPOConfig(str(folder), **(settings | kwargs)),
        train_dataset=[{"prompt": prompt} for prompt in ("a red cube to the left of a blue sphere", "a cat")],
        peft_config=peft_config,
    )
