"""The five methods of the FLUX policy against `FluxPipeline` itself, and the tiny pipelines the tests run on."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from flux import FLUX_20M, build_clip_tokenizer, build_corpus, build_t5_tokenizer

from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy


PROMPTS = ["a red circle left of a blue square", "a cat", "a large green square above the dog"]
# samplers.md, "Schedules for tests": FLUX.1-dev at 512 × 512 pixels
SIGMAS = {
    6: [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0],
    10: [1, 0.9441, 0.8825, 0.8142, 0.7380, 0.6525, 0.5559, 0.4459, 0.3195, 0.1726, 0],
}


def generators(num_images):
    return [torch.Generator().manual_seed(seed) for seed in range(num_images)]


def relative_change(changed, reference):
    return ((changed - reference).pow(2).mean() / reference.var()).sqrt().item()


@pytest.fixture(scope="module")
def inputs(flux_policy):
    """Latents, a noise level, embeddings of three prompts."""
    options = SamplingOptions(height=32, width=32, num_inference_steps=4, guidance_scale=3.5)
    return flux_policy.prepare_latents(generators(3), options), torch.tensor(0.7), flux_policy.encode_prompt(PROMPTS)


# ---------------------------------------------------------------------------------------------------- the tiny pipeline


def test_the_tiny_images_depend_on_the_prompt_and_are_not_saturated(flux_policy):
    kwargs = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16, output_type="np")
    images = flux_policy.pipeline(
        PROMPTS, generator=[torch.Generator().manual_seed(0) for _ in PROMPTS], **kwargs
    ).images
    assert np.abs(images[0] - images[1]).mean() > 0.02 and np.abs(images[1] - images[2]).mean() > 0.02
    assert ((images == 0) | (images == 1)).mean() < 0.2 and images.std() > 0.1


def test_weights_depend_on_the_seed_alone(make_flux_pipeline):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = make_flux_pipeline(seed=1).transformer.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    second, other = (make_flux_pipeline(seed=seed).transformer.state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])


def test_every_word_of_the_corpus_is_one_token():
    corpus = build_corpus()
    clip, t5 = build_clip_tokenizer(corpus), build_t5_tokenizer(corpus)
    text = " ".join(corpus)
    assert len(clip.tokenize(text)) == len(t5.tokenize(text)) == len(corpus)
    # an end of the text within a text would hide the rest of it from CLIP
    ids = clip("Zebra’s größe, 🙂 中文 12 ÿ").input_ids
    assert ids.index(clip.eos_token_id) == len(ids) - 1
    assert clip.model_max_length == 77 and t5.model_max_length == 512
    for built, again in ((clip, build_clip_tokenizer(corpus)), (t5, build_t5_tokenizer(corpus))):
        assert built.get_vocab() == again.get_vocab()


def test_a_saved_pipeline_makes_the_same_images(make_flux_pipeline, flux_folder):
    kwargs = dict(height=32, width=32, num_inference_steps=2, max_sequence_length=16, output_type="np")
    pipelines = make_flux_pipeline(), FluxPipeline.from_pretrained(flux_folder)
    images = [pipeline(PROMPTS[0], generator=generators(1), **kwargs).images for pipeline in pipelines]
    # mapped weights may lie at other addresses than built ones, where kernels round differently
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5)


def test_the_benchmark_model_has_20_million_parameters(make_flux_pipeline):
    transformer = make_flux_pipeline(**FLUX_20M).transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(20e6, rel=0.05)


# ------------------------------------------------------------------------------------------------------ the five methods


@pytest.mark.parametrize("use_autocast", [False, True])
def test_prompts_are_encoded_as_by_the_pipeline(flux_policy, use_autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_autocast):
        embeds = flux_policy.encode_prompt(PROMPTS)
    with torch.no_grad():
        prompt_embeds, pooled_prompt_embeds, _ = flux_policy.pipeline.encode_prompt(PROMPTS, max_sequence_length=16)
    assert torch.equal(embeds["prompt_embeds"], prompt_embeds) and prompt_embeds.shape == (3, 16, 32)
    assert torch.equal(embeds["pooled_prompt_embeds"], pooled_prompt_embeds) and pooled_prompt_embeds.shape == (3, 32)
    assert set(embeds) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert not any(rows.requires_grad for rows in embeds.values())


def test_latents_are_packed_noise_of_the_images_own_generators(flux_policy, options):
    options = replace(options, height=24, width=48)
    latents = flux_policy.prepare_latents(generators(3), options)
    assert latents.shape == (3, 3 * 6, 16) and latents.dtype == torch.float32
    for seed in range(3):
        noise = torch.randn(1, 4, 6, 12, generator=torch.Generator().manual_seed(seed))
        for token in range(18):
            row, column = 2 * (token // 6), 2 * (token % 6)
            assert torch.equal(latents[seed, token], noise[0, :, row : row + 2, column : column + 2].flatten())


@pytest.mark.parametrize("num_inference_steps", SIGMAS)
def test_sigmas_are_those_of_flux_dev(make_flux_pipeline, num_inference_steps):
    policy = make_policy(make_flux_pipeline(vae_channels=(4, 4, 4, 4)))  # 8 pixels per latent, as FLUX.1's VAE
    options = SamplingOptions(height=512, width=512, num_inference_steps=num_inference_steps, guidance_scale=3.5)
    sigmas = policy.prepare_sigmas(options)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"
    assert sigmas.tolist() == pytest.approx(SIGMAS[num_inference_steps], abs=6e-5)
    assert sigmas[0] == 1 and sigmas[-1] == 0


def test_a_fixed_shift_is_kept(make_flux_pipeline, options):
    pipeline = make_flux_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # FLUX.1-schnell's
    assert make_policy(pipeline).prepare_sigmas(options).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_bfloat16_transformer_rounds_little(make_flux_pipeline, flux_policy, inputs, options):
    # A noise level and a guidance scale whose thousandfold bfloat16 holds: this untrained model hears the rounding of
    # others as the pipeline in bfloat16 does.
    latents, _, embeds = inputs
    options = replace(options, guidance_scale=4.0)
    pipeline = make_flux_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    policy = make_policy(pipeline, max_sequence_length=16)
    with torch.no_grad():
        velocity, reference = (
            one.predict_velocity(one.transformer, latents, torch.tensor(0.5), embeds, options)
            for one in (policy, flux_policy)
        )
    assert velocity.dtype == torch.float32
    assert 1e-4 < relative_change(velocity, reference) < 0.03


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_an_error(flux_policy, prompt):
    with pytest.raises(ValueError, match=r"Prompt 1 is .*Drop it"):
        flux_policy.check_prompts(["a cat", prompt])


def test_a_prompt_that_would_be_cut_off_is_an_error(flux_policy):
    # 15 words and the end of the text fill the encoder: the last word still counts
    fitting = "a " * 14
    flux_policy.check_prompts([fitting + "cat", *PROMPTS])
    one, other = flux_policy.encode_prompt([fitting + "cat", fitting + "dog"])["prompt_embeds"]
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match=r"Prompt 2, 'a a .*', has 17 tokens.*=16.*at most 512"):
        flux_policy.check_prompts(["a cat", "a dog", fitting + "red cat"])
    with pytest.raises(ValueError, match=r"Prompt 0, 'a{57}\.\.\.'"):
        flux_policy.check_prompts(["a" * 600])


@pytest.fixture
def library_log(caplog):
    """What diffusers and transformers log; not every version of them passes it on to the root logger."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_clips_own_limit_is_neither_an_error_nor_a_warning(make_flux_pipeline, library_log):
    policy = make_policy(make_flux_pipeline(), max_sequence_length=128)
    prompts = ["a " * 100 + word for word in ("cat", "dog")]
    policy.check_prompts(prompts)
    embeds = policy.encode_prompt(prompts)
    assert torch.equal(*embeds["pooled_prompt_embeds"]) and not torch.equal(*embeds["prompt_embeds"])
    assert not library_log.records
    # what T5 does not see is still said, as is all the pipeline says by itself
    policy.encode_prompt(["a " * 130])
    assert library_log.records
    assert all("`max_sequence_length` is set to" in record.message for record in library_log.records)
    policy.pipeline.encode_prompt(prompts[0])
    assert "CLIP can only handle" in library_log.records[-1].message


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (30, 32, r"`height=30` .*multiples of 8 pixels. Nearest: 24 and 32\."),
        (32, 513, r"`width=513` .*Nearest: 512 and 520\."),
        (4, 32, r"`height=4` .*Nearest: 8\."),
        (32, 0, r"`width=0` .*Nearest: 8\."),
        (-8, 32, r"`height=-8` .*Nearest: 8\."),
    ],
)
def test_a_wrong_image_size_names_the_nearest(flux_policy, height, width, message):
    with pytest.raises(ValueError, match=message):
        flux_policy.check_size(height, width)


def test_good_image_sizes_pass(flux_policy, make_flux_pipeline):
    flux_policy.check_size(24, 48)
    make_policy(make_flux_pipeline(vae_channels=(4, 4, 4, 4))).check_size(512, 1024)  # multiples of 16, as FLUX.1


def test_an_unknown_pipeline_names_the_known_ones(flux_policy):
    pipeline = FluxImg2ImgPipeline(**flux_policy.pipeline.components)
    with pytest.raises(ValueError, match="'FluxImg2ImgPipeline'; available: 'FluxPipeline'"):
        make_policy(pipeline)


def test_another_scheduler_is_an_error(make_flux_pipeline):
    pipeline = make_flux_pipeline()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match=r"FlowMatchHeunDiscreteScheduler.*from_config"):
        make_policy(pipeline)


@pytest.mark.parametrize("max_sequence_length", [0, 513])
def test_a_sequence_length_the_pipeline_refuses_is_an_error(flux_policy, max_sequence_length):
    with pytest.raises(ValueError, match=f"from 1 to 512.*got {max_sequence_length}"):
        make_policy(flux_policy.pipeline, max_sequence_length=max_sequence_length)
