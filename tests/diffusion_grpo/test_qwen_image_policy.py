"""What is Qwen-Image's own: the template around a prompt, masks, the norm of guided velocities, the end of its schedule."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.diffusion_grpo.families import FAMILIES, shared_policy
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator


PROMPTS = ["a cat", "a red circle left of a blue square"]
SUFFIX = 5  # tokens of the template behind the prompt: its end, a new line, the assistant's turn


@pytest.fixture
def policy():
    return shared_policy("qwen_image")


@pytest.fixture
def options():
    return FAMILIES["qwen_image"].options()


def test_prompts_are_as_long_as_they_are_and_the_template_before_them_is_dropped(policy):
    embeds = policy.encode_prompt(PROMPTS)
    lengths = [2 + SUFFIX, 8 + SUFFIX]
    assert embeds["prompt_embeds"].shape == (2, lengths[1], 32)
    assert (
        embeds["prompt_embeds_mask"].sum(1).tolist() == [policy.count_tokens(prompt) for prompt in PROMPTS] == lengths
    )
    assert not embeds["prompt_embeds"][0, lengths[0] :].any() and embeds["prompt_embeds"][0, : lengths[0]].any()
    alone = policy.encode_prompt(PROMPTS[:1])
    assert alone["prompt_embeds_mask"].tolist() == [[1] * lengths[0]]  # the pipeline gives none here
    torch.testing.assert_close(alone["prompt_embeds"], embeds["prompt_embeds"][:1, : lengths[0]])


def test_of_padding_only_what_the_batch_needs_reaches_the_transformer(policy, options):
    seen = []
    hook = policy.transformer.register_forward_hook(
        lambda _module, _args, kwargs, _output: seen.append(
            (kwargs["encoder_hidden_states"].shape[1], kwargs["encoder_hidden_states_mask"] is not None)
        ),
        with_kwargs=True,
    )
    embeds = PromptCache(policy, "cpu", negative_prompt="a dog").get(PROMPTS)
    latents = policy.prepare_latents([image_generator(0, 0)] * 2, options)
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        batch = {name: tensor[rows] for name, tensor in embeds.items()}
        policy.predict_velocity(policy.transformer, latents[rows], torch.tensor(0.7), batch, options)
    hook.remove()
    negative = (2 + SUFFIX, False)
    assert seen == [(2 + SUFFIX, False), negative, (8 + SUFFIX, False), negative, (8 + SUFFIX, True), negative]


@torch.no_grad()
def test_guidance_keeps_the_norm_of_every_token(policy, options):
    embeds = PromptCache(policy, "cpu", negative_prompt="a dog").get(PROMPTS)
    latents = policy.prepare_latents([image_generator(0, index) for index in range(2)], options)
    plain, weak, strong = (
        policy.predict_velocity(
            policy.transformer, latents, torch.tensor(0.7), embeds, replace(options, guidance_scale=scale)
        )
        for scale in (1.0, 2.0, 4.0)
    )
    for guided in (weak, strong):
        torch.testing.assert_close(guided.norm(dim=-1), plain.norm(dim=-1))
        assert not torch.allclose(guided, plain, atol=0.1)
    # in the plane of both velocities, further on the same side: a cosine falls with the scale
    cosines = [torch.cosine_similarity(guided, plain, dim=-1).mean() for guided in (weak, strong)]
    assert 1 > cosines[0] > cosines[1]


@pytest.mark.parametrize("num_inference_steps", [2, 10])
def test_sigmas_are_stretched_to_end_at_the_terminal_one(num_inference_steps):
    # 8 pixels per latent, as Qwen-Image's VAE
    policy = FAMILIES["qwen_image"].make_policy(vae_multipliers=(1, 1, 1, 1), vae_channels=4)
    sigmas = policy.prepare_sigmas(FAMILIES["qwen_image"].options(512, 512, num_inference_steps))
    shift = 0.5 + (32 * 32 - 256) * (0.9 - 0.5) / (8192 - 256)
    uniform = [1 - k / num_inference_steps for k in range(num_inference_steps)]
    shifted = [math.exp(shift) / (math.exp(shift) + 1 / t - 1) for t in uniform]
    expected = [1 - (1 - t) * (1 - 0.02) / (1 - shifted[-1]) for t in shifted]
    assert sigmas.tolist() == pytest.approx([*expected, 0], abs=1e-6)


def test_one_step_is_an_error_as_its_sigma_cannot_be_stretched(policy, options, make_trainer):
    scheduler = policy.pipeline.scheduler
    with pytest.warns(RuntimeWarning, match="invalid value"):
        scheduler.set_timesteps(sigmas=[1.0], mu=0.5)
    assert scheduler.sigmas[0].isnan()
    with pytest.raises(ValueError, match=r"`num_inference_steps=1` is too few.*`shift_terminal=0.02`.*at least 2"):
        policy.prepare_sigmas(replace(options, num_inference_steps=1))
    # told before the training whose end it would be
    with pytest.raises(ValueError, match=r"`eval_num_inference_steps`: `num_inference_steps=1` is too few"):
        make_trainer(
            pipeline=policy.pipeline,
            eval_dataset=[{"prompt": "a cat"}],
            eval_num_inference_steps=1,
            **FAMILIES["qwen_image"].guidance,
        )
    pipeline = FAMILIES["qwen_image"].build()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = make_policy(pipeline).prepare_sigmas(replace(options, num_inference_steps=1))
    assert sigmas.tolist() == [1, 0]


def test_what_the_last_block_makes_of_the_text_is_frozen(make_trainer):
    trainer = make_trainer(pipeline=FAMILIES["qwen_image"].build(), peft_config=None, beta=0.0, learning_rate=1e-3)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    unchanged = {name for name, weight in trainer.model.named_parameters() if torch.equal(weight, before[name])}
    frozen = {name for name, weight in trainer.model.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name in before if name.startswith(tuple(trainer.policy.idle_modules))}
    assert len(frozen) == 6 and frozen <= unchanged and not {"img_in.weight", "proj_out.weight"} & unchanged
