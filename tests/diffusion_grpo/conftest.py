"""Tiny FLUX pipelines of the real classes. Nothing is downloaded."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging
from flux import build_flux_pipeline
from peft import LoraConfig

from trl_spatial import DiffusionGRPOTrainer
from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy


logging.disable_progress_bar()

PROMPTS = ["a red cube", "a cat to the left of a dog", "the lamp", "a small blue sphere"]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def redness(prompts, images, **columns):
    """How red images are, from -1 to 1."""
    pixels = [np.asarray(image).astype(float) / 255 for image in images]
    return [float(image[..., 0].mean() - image[..., 1:].mean()) for image in pixels]


@pytest.fixture(scope="session")
def make_flux_pipeline():
    """A function that builds a tiny `FluxPipeline`; keyword arguments go to `build_flux_pipeline`."""
    return build_flux_pipeline


@pytest.fixture(scope="module")
def flux_policy():
    """Policy of a tiny `FluxPipeline` that takes 16 tokens. Treat it as read-only."""
    return make_policy(build_flux_pipeline(), max_sequence_length=16)


@pytest.fixture
def options():
    """Few steps to a small image: 16 tokens."""
    return SamplingOptions(height=32, width=32, num_inference_steps=4, guidance_scale=3.5)


@pytest.fixture(scope="module")
def make_pipeline(make_flux_pipeline):
    """A function that builds a pipeline with a transformer of its own; the rest is shared."""
    components = make_flux_pipeline().components

    def make(dtype=torch.float32):
        transformer = copy.deepcopy(components["transformer"])
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        return FluxPipeline(**{**components, "transformer": transformer})

    return make


@pytest.fixture
def make_trainer(tmp_path, make_pipeline):
    """A function that builds a trainer: groups of four images, of which two are kept, two prompts per rollout."""

    def make(
        reward_funcs=redness,
        *,
        trainer_class=DiffusionGRPOTrainer,
        pipeline=None,
        train_dataset=None,
        peft_config="lora",
        **kwargs,
    ):
        trainer_kwargs = {
            name: kwargs.pop(name)
            for name in ("eval_dataset", "eval_reward_funcs", "callbacks", "optimizers")
            if name in kwargs
        }
        settings = dict(
            num_generations=4,
            top_k=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            height=16,
            width=16,
            num_inference_steps=3,
            rollout_batch_size=8,
            max_sequence_length=16,
            learning_rate=1e-2,
            ema_decay=0.0,
            gradient_checkpointing=False,
            eval_num_inference_steps=3,
            max_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        return trainer_class(
            pipeline or make_pipeline(),
            reward_funcs,
            trainer_class._config_class(str(tmp_path / "run"), **(settings | kwargs)),
            train_dataset=train_dataset or [{"prompt": prompt} for prompt in PROMPTS],
            peft_config=LoraConfig(**LORA) if peft_config == "lora" else peft_config,
            **trainer_kwargs,
        )

    return make
