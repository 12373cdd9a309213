"""Rollouts against `FluxPipeline` without noise, and against the Gaussian they say they sample from with noise."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.rollout import Rollout, sample_rollout
from trl_spatial.diffusion_grpo.sde import DYNAMICS, sde_step
from trl_spatial.generation.seeds import image_generator


# of image_generator(0, 0, 0, 0) and image_generator(42, 7, 1, 23)
GOLDEN_SEEDS = [3678467582, 1890012126]
PROMPTS = [
    "a red circle left of a blue square",
    "a cat",
    "a large green square above the dog",
    "a lamp",
    "the cat is left of the table",
]
STOCHASTIC = dict(trained_steps=(0, 1, 2), noise_level=0.7, dynamics="flow_sde")


def sample(policy, options, *, prompts=PROMPTS, seeds=range(5), batch_size=5, transformer=None, **kwargs):
    return sample_rollout(
        policy,
        transformer or policy.transformer,
        policy.encode_prompt(prompts),
        [image_generator(0, seed) for seed in seeds],
        options,
        sigmas=policy.prepare_sigmas(options),
        batch_size=batch_size,
        **(STOCHASTIC | kwargs),
    )


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("trained_steps", [(), (0, 1, 2)])
def test_without_noise_images_are_the_pipelines(flux_policy, options, height, width, dynamics, trained_steps):
    options = replace(options, height=height, width=width)
    rollout = sample(
        flux_policy,
        options,
        dynamics=dynamics,
        trained_steps=trained_steps,
        noise_level=0.0 if trained_steps else 0.7,
    )

    def run_pipeline(output_type):
        return flux_policy.pipeline(
            PROMPTS,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=3.5,
            max_sequence_length=16,
            generator=[image_generator(0, seed) for seed in range(5)],
            output_type=output_type,
        ).images

    assert torch.allclose(rollout.final_latents, run_pipeline("latent"), rtol=0, atol=1e-5)
    # rounding to 256 levels turns a difference of 1e-5 into one level, where it falls on a border
    difference = np.abs(pixels(rollout.images) / 255 - run_pipeline("np"))
    assert rollout.images[0].size == (width, height) and difference.max() < 0.5 / 255 + 1e-5


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_image_does_not_depend_on_the_batch(flux_policy, options, batch_size):
    together, apart = (
        sample(flux_policy, options, keep_activations=True, **size) for size in ({}, {"batch_size": batch_size})
    )
    assert torch.equal(apart.latents[:, 0], together.latents[:, 0])  # the noise itself is the same
    for field in fields(Rollout):
        one, other = getattr(apart, field.name), getattr(together, field.name)
        if field.name == "images":
            assert np.abs(pixels(one) - pixels(other)).max() <= 1
            continue
        pairs = [(one, other)] if field.name != "activations" else list(zip(one.tensors, other.tensors, strict=True))
        assert pairs and all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert not torch.allclose(together.final_latents[0], together.final_latents[1], atol=0.1)


def test_images_of_one_prompt_alone_are_those_of_a_list(flux_policy, options):
    everything = sample(flux_policy, options)
    order = [3, 1]
    some = sample(flux_policy, options, prompts=[PROMPTS[i] for i in order], seeds=order)
    assert torch.allclose(some.final_latents, everything.final_latents[order], atol=1e-4)
    assert torch.allclose(some.log_probs, everything.log_probs[order], atol=1e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_scoring_the_recorded_steps_gives_the_recorded_log_probs(flux_policy, options, dynamics):
    rollout = sample(flux_policy, options, dynamics=dynamics)
    sigmas, embeds = flux_policy.prepare_sigmas(options), flux_policy.encode_prompt(PROMPTS)
    assert rollout.latents.shape == rollout.next_latents.shape == (5, 3, 16, 16) and rollout.log_probs.shape == (5, 3)
    for k, step in enumerate(STOCHASTIC["trained_steps"]):
        velocity = flux_policy.predict_velocity(
            flux_policy.transformer, rollout.latents[:, k], sigmas[step], embeds, options
        )
        scored = sde_step(
            velocity,
            rollout.latents[:, k],
            sigmas[step],
            sigmas[step + 1],
            0.7,
            dynamics=dynamics,
            sigma_max=sigmas[1] if step == 0 else None,
            next_latents=rollout.next_latents[:, k],
        )
        # with gradient, as in training, torch may take other kernels: the ratio is measured in units of 1e-4
        assert torch.allclose(scored.log_probs, rollout.log_probs[:, k], rtol=0, atol=1e-6)
        noise = (rollout.next_latents[:, k] - scored.mean.detach()) / scored.std[:, None, None]
        assert noise.mean().abs() < 0.1 and noise.std() == pytest.approx(1, abs=0.1)
        assert scored.log_probs.requires_grad


def test_steps_follow_each_other_and_untrained_ones_are_the_ode(flux_policy, options):
    options = replace(options, num_inference_steps=5)
    rollout = sample(flux_policy, options, trained_steps=(1, 2))
    assert torch.equal(rollout.next_latents[:, 0], rollout.latents[:, 1])
    sigmas, embeds = flux_policy.prepare_sigmas(options), flux_policy.encode_prompt(PROMPTS)

    @torch.no_grad()
    def euler(latents, step):
        velocity = flux_policy.predict_velocity(flux_policy.transformer, latents, sigmas[step], embeds, options)
        return latents - (sigmas[step] - sigmas[step + 1]) * velocity

    start = flux_policy.prepare_latents([image_generator(0, seed) for seed in range(5)], options)
    assert torch.allclose(euler(start, 0), rollout.latents[:, 0], atol=1e-5)
    assert torch.allclose(euler(euler(rollout.next_latents[:, 1], 3), 4), rollout.final_latents, atol=1e-5)
    assert not torch.allclose(euler(rollout.latents[:, 0], 1), rollout.next_latents[:, 0], atol=0.1)


def test_noise_comes_from_the_images_generator_after_its_first_latents(flux_policy, options):
    rollout = sample(flux_policy, options, dynamics="cps", noise_level=1.0, trained_steps=(0, 1))
    sigmas, embeds = flux_policy.prepare_sigmas(options), flux_policy.encode_prompt(PROMPTS)
    for seed in range(5):
        generator = image_generator(0, seed)
        torch.randn(1, 4, 8, 8, generator=generator)  # the first latents
        for k in range(2):
            velocity = flux_policy.predict_velocity(
                flux_policy.transformer,
                rollout.latents[:, k],
                sigmas[k],
                embeds,
                options,
            )[seed]
            clean = rollout.latents[seed, k] - sigmas[k] * velocity
            # at noise level 1, CPS keeps nothing of the old noise: (1 - t') x0 + t' z
            noise = (rollout.next_latents[seed, k] - (1 - sigmas[k + 1]) * clean) / sigmas[k + 1]
            assert torch.allclose(noise, torch.randn(16, 16, generator=generator), atol=1e-4)


@pytest.mark.parametrize("use_autocast", [False, True])
def test_a_bfloat16_transformer_gives_float32_rollouts(make_flux_pipeline, options, use_autocast):
    pipeline = make_flux_pipeline()
    if not use_autocast:
        pipeline.transformer.to(torch.bfloat16)
    policy = make_policy(pipeline, max_sequence_length=16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_autocast):
        rollout = sample(policy, options)
    for tensor in (rollout.latents, rollout.next_latents, rollout.log_probs, rollout.final_latents):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    # latents that went through bfloat16 would come back unchanged
    assert not torch.equal(rollout.latents, rollout.latents.bfloat16().float())
    # what training computes under the same conditions is what the rollout saw
    sigmas, embeds = policy.prepare_sigmas(options), policy.encode_prompt(PROMPTS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_autocast):
        velocity = policy.predict_velocity(policy.transformer, rollout.latents[:, 1], sigmas[1], embeds, options)
    scored = sde_step(
        velocity, rollout.latents[:, 1], sigmas[1], sigmas[2], 0.7, next_latents=rollout.next_latents[:, 1]
    )
    assert torch.equal(scored.log_probs, rollout.log_probs[:, 1])


def test_the_transformer_runs_once_per_image_and_step(flux_policy, options):
    rows = []
    hook = flux_policy.transformer.register_forward_hook(
        lambda _module, _args, kwargs, _output: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    rollout = sample(flux_policy, options, batch_size=2)
    hook.remove()
    assert rows == [2] * 4 + [2] * 4 + [1] * 4
    assert len(rollout.images) == 5


def test_rollouts_have_no_gradient_but_can_be_trained_on(flux_policy, make_flux_pipeline, options):
    policy = make_policy(make_flux_pipeline(), max_sequence_length=16)
    rollout = sample(policy, options)
    assert not (rollout.log_probs.requires_grad or rollout.latents.requires_grad or rollout.latents.is_inference())
    embeds = policy.encode_prompt(PROMPTS)
    policy.predict_velocity(
        policy.transformer, rollout.latents[:, 0], torch.tensor(1.0), embeds, options
    ).sum().backward()
    assert policy.transformer.proj_out.weight.grad.abs().sum() > 0


def test_the_given_transformer_samples(flux_policy, make_flux_pipeline, options):
    other = make_policy(make_flux_pipeline(seed=1), max_sequence_length=16)
    rollout = sample(flux_policy, options, transformer=other.transformer)
    assert not torch.allclose(rollout.final_latents, sample(flux_policy, options).final_latents, atol=0.1)


# ---------------------------------------------------------------------------------------------------- random generators


def test_a_generator_depends_on_its_arguments_alone():
    first, second = (torch.randn(8, generator=image_generator(3, 1, 4, 1)) for _ in range(2))
    assert torch.equal(first, second)
    # a run that is resumed with other versions of the libraries goes on with the same images
    assert [image_generator(*path).initial_seed() for path in ((0, 0, 0, 0), (42, 7, 1, 23))] == GOLDEN_SEEDS


def test_generators_of_different_images_differ():
    paths = [(s, r, g, i) for s in (0, 1) for r in range(8) for g in range(8) for i in range(8)]
    paths += [(s, *rest) for s in (0, 1) for rest in ((), (0,), (0, 0), (0, 0, 0, 0), (8, 0, 0))]
    assert len({image_generator(*path).initial_seed() for path in paths}) == len(paths)


def test_noise_of_neighbours_is_not_related():
    noise = torch.stack([torch.randn(4096, generator=image_generator(0, i // 20, i % 20)) for i in range(100)])
    correlation = torch.corrcoef(noise) - torch.eye(100)
    # 4,950 pairs of independent draws: the largest is near 4 / sqrt(4096)
    assert correlation.abs().max() < 5.5 / 4096**0.5
    assert correlation.std() == pytest.approx(1 / 4096**0.5, rel=0.05)


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("trained_steps", [(3,), (0, 1, 2, 3), (1, 0), (1, 1), (-1,), (4,)])
def test_impossible_trained_steps_are_an_error(flux_policy, options, trained_steps):
    with pytest.raises(ValueError, match=r"ascending indices from 0 to 2.*last of 4 steps is never stochastic"):
        sample(flux_policy, options, trained_steps=trained_steps)


def test_a_generator_too_few_is_an_error(flux_policy, options):
    with pytest.raises(ValueError, match=r"4 generators and embeddings of \[5\] rows"):
        sample(flux_policy, options, seeds=range(4))
