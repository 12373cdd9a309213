"""What is Stable Diffusion 3's own: three text encoders, latents that are images, its schedule, plain guidance."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from tests.diffusion_grpo.families import FAMILIES, MAX_SEQUENCE_LENGTH, shared_policy
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator


PROMPTS = ["a cat", "a red circle left of a blue square"]
# samplers.md, "Schedules for tests": SD3.5 Medium, 10 steps
SIGMAS = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]


@pytest.fixture
def policy():
    return shared_policy("sd3")


@pytest.fixture
def options():
    return FAMILIES["sd3"].options()


def test_prompts_are_read_by_both_clips_and_by_t5(policy):
    embeds = policy.encode_prompt(PROMPTS)
    assert embeds["prompt_embeds"].shape == (2, 77 + MAX_SEQUENCE_LENGTH, 32)
    with torch.no_grad():
        expected, _, pooled, _ = policy.pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
    assert torch.equal(embeds["prompt_embeds"], expected) and torch.equal(embeds["pooled_prompt_embeds"], pooled)
    assert len(policy.encoders) == 3


def test_latents_are_the_positions_of_the_image_row_by_row(policy, options):
    latents = policy.prepare_latents([image_generator(0, 0)], replace(options, height=24, width=48))
    noise = torch.randn(1, 4, 6, 12, generator=image_generator(0, 0))
    assert latents.shape == (1, 6 * 12, 4)
    for position in range(72):
        assert torch.equal(latents[0, position], noise[0, :, position // 12, position % 12])


def test_an_image_changes_where_its_latents_do(policy, options):
    options = replace(options, height=64, width=128)
    latents = policy.prepare_latents([image_generator(0, 0)], options)
    changed = latents.clone().unflatten(1, (16, 32))
    changed[:, 1, 30] += 3  # the upper right corner: 4 pixels per latent
    before, after = (
        np.asarray(policy.decode_latents(one, options)[0], dtype=float) for one in (latents, changed.flatten(1, 2))
    )
    rows, columns = np.abs(after - before).sum(2), np.abs(after - before).sum(2)
    assert rows.sum(1).argmax() < 16 and columns.sum(0).argmax() >= 112


def test_sigmas_are_those_of_sd3_medium(policy, options):
    sigmas = policy.prepare_sigmas(replace(options, num_inference_steps=10))
    assert sigmas.tolist() == pytest.approx(SIGMAS, abs=6e-5)
    assert policy.prepare_sigmas(replace(options, num_inference_steps=1)).tolist() == [1, 0]


def test_a_shift_that_depends_on_the_size_is_the_pipelines(options):
    pipeline = FAMILIES["sd3"].build()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    policy = make_policy(pipeline)
    for size in (32, 128):
        pipeline("a cat", height=size, width=size, num_inference_steps=4, output_type="latent")
        expected = pipeline.scheduler.sigmas.clone()
        assert torch.equal(policy.prepare_sigmas(replace(options, height=size, width=size)), expected)


@torch.no_grad()
def test_guidance_is_a_line_through_the_velocities_of_both_prompts(policy, options):
    def velocity(prompts, guidance_scale, **kwargs):
        embeds = PromptCache(policy, "cpu", **kwargs).get(prompts)
        return policy.predict_velocity(
            policy.transformer, latents, torch.tensor(0.7), embeds, replace(options, guidance_scale=guidance_scale)
        )

    latents = policy.prepare_latents([image_generator(0, index) for index in range(2)], options)
    with_prompt, away_from = velocity(PROMPTS, 1.0), velocity(["a dog"] * 2, 1.0)
    for scale in (2.0, 4.5):
        expected = away_from + scale * (with_prompt - away_from)
        torch.testing.assert_close(velocity(PROMPTS, scale, negative_prompt="a dog"), expected, rtol=0, atol=1e-4)


def test_a_pipeline_without_t5_is_an_error(policy):
    components = policy.pipeline.components | {"text_encoder_3": None, "tokenizer_3": None}
    with pytest.raises(ValueError, match=r"no `text_encoder_3`.*77 tokens"):
        make_policy(StableDiffusion3Pipeline(**components))


def test_clips_own_limit_is_neither_an_error_nor_a_warning(caplog):
    policy = make_policy(FAMILIES["sd3"].build(), max_sequence_length=128)
    prompts = ["a " * 100 + word for word in ("cat", "dog")]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        policy.check_prompts(prompts)
        embeds = policy.encode_prompt(prompts)
        assert not caplog.records
        policy.pipeline.encode_prompt(prompts, None, None)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert any("CLIP can only handle" in record.message for record in caplog.records)
    assert torch.equal(*embeds["pooled_prompt_embeds"]) and not torch.equal(*embeds["prompt_embeds"])
