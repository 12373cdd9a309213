"""What is Z-Image's own: the template around a prompt, captions of different lengths, its time and sign, its guidance."""

from dataclasses import replace

import pytest
import torch

from tests.diffusion_grpo.families import FAMILIES, shared_policy
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator


PROMPTS = ["a cat", "a red circle left of a blue square"]
TEMPLATE = 8  # tokens around the prompt: the beginning and the end of the user's turn, and the assistant's
# 40 tokens beside 13: captions are filled up to multiples of 32, so here one is longer than the other
LONG = " ".join(["a cat and a dog"] * 6) + " and a lamp"


@pytest.fixture
def policy():
    return shared_policy("z_image")


@pytest.fixture
def options():
    return FAMILIES["z_image"].options()


def latents_of(policy, options, num_images=2):
    return policy.prepare_latents([image_generator(0, index) for index in range(num_images)], options)


def test_prompts_are_as_long_as_they_are(policy):
    prompts = list(PROMPTS)
    embeds = policy.encode_prompt(prompts)
    assert prompts == PROMPTS  # the pipeline writes its template into the list that it gets
    lengths = [2 + TEMPLATE, 8 + TEMPLATE]
    assert embeds["prompt_embeds"].shape == (2, lengths[1], 32)
    assert embeds["prompt_embeds_mask"].sum(1).tolist() == [policy.count_tokens(text) for text in PROMPTS] == lengths
    with torch.no_grad():
        rows, _ = policy.pipeline.encode_prompt(list(PROMPTS), max_sequence_length=policy.max_sequence_length)
    for embed, row in zip(embeds["prompt_embeds"], rows, strict=True):
        assert torch.equal(embed[: len(row)], row) and not embed[len(row) :].any()


@torch.no_grad()
def test_captions_of_other_lengths_do_not_change_an_image(options):
    policy = make_policy(FAMILIES["z_image"].build(), max_sequence_length=64)
    assert policy.count_tokens(LONG) > 32 > policy.count_tokens(PROMPTS[0])
    cache, latents = PromptCache(policy, "cpu", negative_prompt="a dog"), latents_of(policy, options)

    def velocity(prompts, rows):
        return policy.predict_velocity(
            policy.transformer, latents[rows], torch.tensor(0.7), cache.get(prompts), options
        )

    together = velocity([PROMPTS[0], LONG], slice(0, 2))
    torch.testing.assert_close(together[:1], velocity([PROMPTS[0]], slice(0, 1)), rtol=0, atol=1e-4)
    torch.testing.assert_close(together[1:], velocity([LONG], slice(1, 2)), rtol=0, atol=1e-4)
    assert not torch.allclose(together[:1], velocity([LONG], slice(0, 1)), atol=0.01)


@torch.no_grad()
def test_the_model_counts_time_from_the_noise_and_predicts_the_opposite(policy, options):
    options, latents = replace(options, guidance_scale=0.0, negative_prompt=None), latents_of(policy, options)
    rows, _ = policy.pipeline.encode_prompt(list(PROMPTS), max_sequence_length=policy.max_sequence_length)
    images = latents.transpose(1, 2).reshape(2, 4, 1, 8, 8)
    output = policy.transformer(list(images), torch.tensor([0.3, 0.3]), rows).sample
    velocity = policy.predict_velocity(
        policy.transformer, latents, torch.tensor(0.7), policy.encode_prompt(PROMPTS), options
    )
    expected = torch.stack([-image.flatten(1).T for image in output])
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_scale_is_what_guidance_adds(policy, options):
    latents = latents_of(policy, options)

    def velocity(prompts, guidance_scale, **kwargs):
        embeds = PromptCache(policy, "cpu", **kwargs).get(prompts)
        return policy.predict_velocity(
            policy.transformer, latents, torch.tensor(0.7), embeds, replace(options, guidance_scale=guidance_scale)
        )

    with_prompt, away_from = velocity(PROMPTS, 0.0), velocity(["a dog"] * 2, 0.0)
    for scale in (0.5, 3.0):
        expected = with_prompt + scale * (with_prompt - away_from)
        torch.testing.assert_close(velocity(PROMPTS, scale, negative_prompt="a dog"), expected, rtol=0, atol=1e-4)
    assert policy.negative_prompt(replace(options, guidance_scale=0.5, negative_prompt=None)) == ""
    with pytest.raises(ValueError, match=r"`guidance_scale=-1.0` is below 0, where ZImagePipeline .*Use 0.0 for none"):
        policy.check_guidance(replace(options, guidance_scale=-1.0))


def test_the_longest_prompt_leaves_the_image_a_place():
    policy = make_policy(FAMILIES["z_image"].build(), max_sequence_length=1504)
    options = replace(FAMILIES["z_image"].options(8, 8), guidance_scale=0.0, negative_prompt=None)
    embeds = {"prompt_embeds": torch.zeros(1, 1504, 32), "prompt_embeds_mask": torch.ones(1, 1504, dtype=torch.long)}
    with torch.no_grad():
        policy.predict_velocity(policy.transformer, latents_of(policy, options, 1), torch.tensor(0.7), embeds, options)
    with pytest.raises(ValueError, match="`max_sequence_length` must be from 1 to 1504"):
        make_policy(policy.pipeline, max_sequence_length=1505)


def test_the_schedule_is_steep(policy, options):
    sigmas = policy.prepare_sigmas(replace(options, num_inference_steps=10))
    linear = torch.linspace(1, 0, 11)
    torch.testing.assert_close(sigmas, 6 * linear / (1 + 5 * linear), rtol=0, atol=1e-6)
