"""Every family against its own pipeline, alone and in a batch, in rollout and in training."""

import ast
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.diffusion_grpo.families import FAMILIES, GUIDED, MAX_SEQUENCE_LENGTH, shared_policy
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies import POLICIES
from trl_spatial.diffusion_grpo.policies.base import negative_embeds
from trl_spatial.diffusion_grpo.rollout import Rollout, sample_rollout
from trl_spatial.diffusion_grpo.runtime.evaluation import PolicyGenerator
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.diffusion_grpo.sde import sde_step
from trl_spatial.generation.drawing import draw_rows
from trl_spatial.generation.seeds import image_generator


# of different lengths, 11 tokens the longest
PROMPTS = ["a cat", "a red circle left of a blue square", "a large green square above the dog"]


@pytest.fixture(params=FAMILIES)
def name(request):
    """Each row of the table of families in turn."""
    return request.param


@pytest.fixture(params=GUIDED)
def guided(request):
    """Each family in turn, with its guidance."""
    return request.param


def generators(num_images):
    return [image_generator(0, index) for index in range(num_images)]


def encode(policy, options, prompts=PROMPTS):
    """Embeddings of a batch, as the pipeline's own call encodes them."""
    embeds, negative_prompt = policy.encode_prompt(prompts), policy.negative_prompt(options)
    if negative_prompt is not None:
        negative = policy.encode_prompt([negative_prompt] * len(prompts))
        embeds |= {f"negative_{key}": rows for key, rows in negative.items()}
    return embeds


def run_pipeline(pipeline, family, options, prompts=PROMPTS, **kwargs):
    guidance = dict(family.pipeline_guidance)
    if "negative_prompt" in guidance:  # a row per image, as ours: a single one could round differently
        guidance["negative_prompt"] = [guidance["negative_prompt"]] * len(prompts)
    return pipeline(
        list(prompts),  # Z-Image's writes into it
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=generators(len(prompts)),
        **guidance,
        **kwargs,
    ).images


def as_sequence(latents):
    """Latents of a pipeline in the shape of ours, (n, image_seq_len, num_channels)."""
    return latents if latents.ndim == 3 else latents.flatten(2).transpose(1, 2)


def sample(policy, options, *, prompts=PROMPTS, seeds=range(3), batch_size=3, embeds=None, **kwargs):
    noise = dict(trained_steps=(), noise_level=0.7, dynamics="flow_sde") | kwargs
    cache = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options))
    return sample_rollout(
        policy,
        policy.transformer,
        cache.get(prompts) if embeds is None else embeds,
        [image_generator(0, seed) for seed in seeds],
        options,
        sigmas=policy.prepare_sigmas(options),
        batch_size=batch_size,
        **noise,
    )


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def relative_change(changed, reference):
    return ((changed - reference).pow(2).mean() / reference.var()).sqrt().item()


# ------------------------------------------------------------------------------------------------- the pipeline's own call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocities_are_bit_for_bit_the_pipelines(name, dtype, monkeypatch):
    # 8 steps: bfloat16 rounds half of their timesteps to other values than a thousand times their rounded sigmas.
    family = FAMILIES[name]
    options, policy = family.options(24, 48, num_inference_steps=8), family.make_policy()
    pipeline, steps = policy.pipeline.to(dtype), []
    step = pipeline.scheduler.step

    def record(velocity, timestep, latents, **kwargs):
        steps.append((velocity, latents))
        return step(velocity, timestep, latents, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.scheduler, "step", record)
        run_pipeline(pipeline, family, options, output_type="latent")
    embeds, sigmas = encode(policy, options), policy.prepare_sigmas(options)
    assert len(steps) == 8
    for sigma, (expected, latents) in zip(sigmas[:-1], steps, strict=True):
        with torch.no_grad():
            velocity = policy.predict_velocity(
                pipeline.transformer, as_sequence(latents).float(), sigma, embeds, options
            )
        assert velocity.dtype == torch.float32 and pipeline.transformer.dtype == dtype
        assert torch.equal(velocity, as_sequence(expected).float())


@torch.no_grad()
def test_each_image_may_have_its_own_noise_level(name):
    policy, options = shared_policy(name), FAMILIES[name].options()
    latents, sigmas = policy.prepare_latents(generators(3), options), torch.tensor([0.9, 0.5, 0.2])
    embeds = encode(policy, options)
    together = policy.predict_velocity(policy.transformer, latents, sigmas, embeds, options)
    for row, sigma in enumerate(sigmas):
        alone = policy.predict_velocity(policy.transformer, latents, sigma, embeds, options)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[row - 1], alone[row - 1], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
def test_without_noise_a_rollout_is_the_pipelines_own_call(name, height, width):
    family, policy = FAMILIES[name], shared_policy(name)
    options = family.options(height, width)
    rollout = sample(policy, options, embeds=encode(policy, options))
    latents = as_sequence(run_pipeline(policy.pipeline, family, options, output_type="latent"))
    # Euler's step is written in another order than the scheduler's
    assert torch.allclose(rollout.final_latents, latents, rtol=0, atol=1e-5)
    difference = np.abs(
        pixels(rollout.images) / 255 - run_pipeline(policy.pipeline, family, options, output_type="np")
    )
    assert rollout.images[0].size == (width, height) and difference.max() < 0.5 / 255 + 1e-5  # of 256 levels
    assert not torch.allclose(latents[0], latents[1], atol=0.1)


def test_the_first_latents_are_the_pipelines_and_of_the_images_own_generators(name):
    family, policy = FAMILIES[name], shared_policy(name)
    options = family.options(24, 48)
    latents = policy.prepare_latents(generators(3), options)
    assert latents.dtype == torch.float32 and latents.is_contiguous()
    for index in range(3):
        assert torch.equal(policy.prepare_latents([image_generator(0, index)], options)[0], latents[index])
        # the noise of the VAE's latents: 4 channels of 6 × 12, in another order
        noise = torch.randn(4 * 6 * 12, generator=image_generator(0, index))
        assert torch.equal(latents[index].flatten().sort().values, noise.sort().values)


@pytest.mark.parametrize("num_inference_steps", [2, 6, 10])
def test_sigmas_are_those_the_pipeline_visits(name, num_inference_steps):
    family, policy = FAMILIES[name], shared_policy(name)
    options = family.options(24, 48, num_inference_steps)
    run_pipeline(policy.pipeline, family, options, prompts=PROMPTS[:1], output_type="latent")
    visited = policy.pipeline.scheduler.sigmas.clone()
    sigmas = policy.prepare_sigmas(options)
    assert torch.equal(sigmas, visited) and sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"
    assert sigmas.shape == (num_inference_steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("use_autocast", [False, True])
def test_encoders_and_vae_compute_as_in_the_pipeline_under_autocast_too(name, use_autocast):
    family, policy = FAMILIES[name], shared_policy(name)
    options = family.options(24, 48, num_inference_steps=2)
    latents = as_sequence(run_pipeline(policy.pipeline, family, options, output_type="latent"))
    expected = run_pipeline(policy.pipeline, family, options)
    embeds = policy.encode_prompt(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_autocast):
        images, under_autocast = policy.decode_latents(latents, options), policy.encode_prompt(PROMPTS)
    for image, reference in zip(images, expected, strict=True):
        assert image.size == (48, 24) and np.array_equal(image, reference)
    assert all(torch.equal(under_autocast[key], rows) and len(rows) == 3 for key, rows in embeds.items())
    assert not any(rows.requires_grad for rows in under_autocast.values())


def test_a_bfloat16_vae_decodes(guided):
    policy, options = FAMILIES[guided].make_policy(), FAMILIES[guided].options()
    policy.vae.to(torch.bfloat16)
    latents = policy.prepare_latents(generators(3), options)
    one, other = (pixels(which.decode_latents(latents, options)) for which in (policy, shared_policy(guided)))
    assert 0 < np.abs(one - other).mean() < 3


# --------------------------------------------------------------------------------------- what an image does not depend on


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_image_does_not_depend_on_its_batch(name, batch_size):
    policy, options = shared_policy(name), FAMILIES[name].options()
    kwargs = {"trained_steps": (0, 1, 2)}
    together, apart = sample(policy, options, **kwargs), sample(policy, options, batch_size=batch_size, **kwargs)
    assert torch.equal(apart.latents[:, 0], together.latents[:, 0])  # the noise itself is the same
    for field in fields(Rollout):
        one, other = getattr(apart, field.name), getattr(together, field.name)
        if field.name == "images":
            assert np.abs(pixels(one) - pixels(other)).max() <= 1
        elif field.name == "activations":
            assert one is other is None
        else:
            assert one.shape == other.shape and torch.allclose(one, other, atol=1e-4)


def test_a_longer_prompt_beside_it_does_not_change_an_image(name):
    policy, options = shared_policy(name), FAMILIES[name].options()
    cache = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options))
    alone, beside_others = cache.get(PROMPTS[:1]), cache.get(PROMPTS)
    latents, sigma = policy.prepare_latents(generators(3), options), torch.tensor(0.7)

    @torch.no_grad()
    def velocity(embeds, rows):
        return policy.predict_velocity(policy.transformer, latents[rows], sigma, embeds, options)

    expected = velocity(alone, slice(0, 1))
    # Rows of the rollout's embeddings, as a batch gets them: padding of other batches is not even computed
    assert torch.equal(velocity({key: rows[:1] for key, rows in beside_others.items()}, slice(0, 1)), expected)
    # In one batch it is, but masked: what is left is rounding, of velocities up to 7 that guidance subtracts
    assert torch.allclose(velocity(beside_others, slice(0, 3))[:1], expected, rtol=0, atol=1e-4)


def test_processes_share_the_images_of_one(guided):
    policy, options = shared_policy(guided), FAMILIES[guided].options()
    cache = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options))

    def images(rank, world_size):
        batches = draw_rows(
            PolicyGenerator(policy, policy.transformer, cache, options),
            [{"prompt": prompt} for prompt in PROMPTS],
            batch_size=2,
            seed=7,
            rank=rank,
            world_size=world_size,
        )
        return {index: image for batch in batches for index, image in zip(batch.indices, batch.images, strict=True)}

    whole, shares = images(0, 1), images(0, 2) | images(1, 2)
    assert sorted(shares) == sorted(whole) == [0, 1, 2]
    for index, image in whole.items():
        assert np.abs(pixels([image]) - pixels([shares[index]])).max() <= 1


# ------------------------------------------------------------------------------------------------------- the transformer


@torch.no_grad()
def test_the_tiny_model_listens_to_all_its_inputs(guided):
    policy, options = shared_policy(guided), FAMILIES[guided].options()
    latents, embeds, sigma = policy.prepare_latents(generators(3), options), encode(policy, options), torch.tensor(0.7)

    def velocity(latents=latents, sigma=sigma, embeds=embeds, options=options):
        return policy.predict_velocity(policy.transformer, latents, sigma, embeds, options)

    reference = velocity()
    others = encode(policy, replace(options, negative_prompt="the lamp"))
    changes = {
        key: embeds | {key: others[key] if "negative" in key else rows.roll(1, 0)} for key, rows in embeds.items()
    }
    changes.pop("negative_prompt_embeds_mask", None)  # of as many tokens
    for key, changed in changes.items():
        assert relative_change(velocity(embeds=changed), reference) > 0.02, key
    assert relative_change(velocity(latents=latents.roll(1, 0)), reference) > 0.05
    assert relative_change(velocity(sigma=torch.tensor(0.5)), reference) > 0.05
    assert relative_change(velocity(options=replace(options, guidance_scale=1.5)), reference) > 0.05
    assert relative_change(velocity(latents=latents.flip(1)).flip(1), reference) > 0.05  # positions


def test_the_velocity_is_of_the_given_transformer_and_every_weight_but_idle_ones_has_a_gradient(name):
    family, policy = FAMILIES[name], shared_policy(name)
    options, other = family.options(), family.make_policy(seed=1)
    inputs = policy.prepare_latents(generators(3), options), torch.tensor(0.7), encode(policy, options), options
    velocity = policy.predict_velocity(other.transformer, *inputs)
    assert torch.equal(velocity, other.predict_velocity(other.transformer, *inputs))
    velocity.sum().backward()
    assert all(parameter.grad is None for parameter in policy.transformer.parameters())
    without = {key for key, parameter in other.transformer.named_parameters() if parameter.grad is None}
    idle = [other.transformer.get_submodule(module) for module in policy.idle_modules]
    assert without == {
        key
        for key, parameter in other.transformer.named_parameters()
        if any(parameter is own for module in idle for own in module.parameters())
    }


def test_lora_is_on_every_attention_projection_and_without_it_the_model_is_the_base_model(guided):
    policy, options = FAMILIES[guided].make_policy(), FAMILIES[guided].options()
    transformer, projections = policy.transformer, set()
    for module_name, module in transformer.named_modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            projections |= {
                f"{module_name}.{part}" for part, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)
            }
    transformer.add_adapter(attention_lora_config(rank=2, alpha=4))
    adapted = {key.split(".lora_A")[0] for key, _ in transformer.named_parameters() if ".lora_A" in key}
    assert adapted == projections and len(adapted) > 8
    change_adapters(transformer)

    @torch.no_grad()
    def velocity(policy):
        latents = policy.prepare_latents(generators(3), options)
        return policy.predict_velocity(
            policy.transformer, latents, torch.tensor(0.7), encode(policy, options), options
        )

    base = velocity(shared_policy(guided))
    assert relative_change(velocity(policy), base) > 0.05
    transformer.disable_adapters()
    assert torch.equal(velocity(policy), base)


@torch.no_grad()
def change_adapters(transformer):
    generator = torch.Generator().manual_seed(0)
    for key, parameter in transformer.named_parameters():
        if ".lora_" in key:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_components_are_the_pipelines(guided):
    policy = shared_policy(guided)
    pipeline = policy.pipeline
    assert POLICIES[type(pipeline).__name__].endswith(f":{type(policy).__name__}")
    assert policy.pipeline_class == type(pipeline).__name__
    assert policy.pipeline_guidance(FAMILIES[guided].options()) == FAMILIES[guided].pipeline_guidance
    assert policy.transformer is pipeline.transformer and policy.vae is pipeline.vae
    encoders = [component for key, component in pipeline.components.items() if key.startswith("text_encoder")]
    assert policy.encoders == encoders and encoders
    policy.check_size(24, 48)
    with pytest.raises(ValueError, match=r"`height=30` .*Nearest: 24 and 32"):
        policy.check_size(30, 32)


# ------------------------------------------------------------------------------------------------------------ in training


class GradientNames(TrainerCallback):
    """Names of the weights that have a gradient, in every update."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append({key for key, parameter in model.named_parameters() if parameter.grad is not None})


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_first_ratio_after_a_rollout_is_exactly_1(make_trainer, name, gradient_checkpointing):
    family, gradients, rows = FAMILIES[name], GradientNames(), []
    trainer = make_trainer(
        pipeline=family.build(),
        num_iterations=2,
        max_steps=3,
        gradient_checkpointing=gradient_checkpointing,
        peft_config=attention_lora_config(rank=2, alpha=4),
        callbacks=[gradients],
        **family.guidance,
    )
    trainer.model.register_forward_hook(
        lambda _module, _args, output: rows.append(len(output[0]))  # inputs have other names in every family
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [(log["ratio/mean"], log["ratio/std"]) == (1.0, 0.0) for log in logs] == [True, False, True]
    assert logs[0]["kl"] == 0 < logs[2]["kl"]
    # No process waits for another's gradient: every trained weight has one, every time
    trained = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert gradients.updates == [trained] * 3 and all(".lora_" in key for key in trained)
    # Evaluations for one image: 2 rollouts of 8 images and 3 steps; 3 updates of 4 images and 2 steps
    factor = 2 if "negative_prompt" in family.pipeline_guidance else 1
    num_sampled, num_trained = factor * 2 * 8 * 3, factor * 3 * 4 * 2
    assert logs[2]["num_policy_passes"] == num_sampled + (3 if gradient_checkpointing else 2) * num_trained
    assert logs[2]["num_reference_passes"] == num_trained
    assert sum(rows) == num_sampled + 2 * num_trained  # forward, of the policy and of the reference


def test_log_probs_of_training_are_those_of_the_rollout(guided):
    policy, options = shared_policy(guided), FAMILIES[guided].options()
    sigmas, embeds = policy.prepare_sigmas(options), encode(policy, options)
    rollout = sample_rollout(
        policy, policy.transformer, embeds, generators(3), options, sigmas=sigmas, trained_steps=(0, 1), noise_level=0.9,
        dynamics="flow_sde", batch_size=3,
    )  # fmt: skip
    for rows in (slice(0, 2), slice(2, 3)):  # another batch than the rollout's: its last bits differ
        batch = {name: tensor[rows] for name, tensor in embeds.items()}
        for step in (0, 1):
            latents = rollout.latents[rows, step]
            scored = sde_step(
                policy.predict_velocity(policy.transformer, latents, sigmas[step], batch, options), latents,
                sigmas[step], sigmas[step + 1], 0.9, sigma_max=sigmas[1] if step == 0 else None,
                next_latents=rollout.next_latents[rows, step],
            )  # fmt: skip
            torch.testing.assert_close(scored.log_probs, rollout.log_probs[rows, step], rtol=0, atol=2e-6)


def test_exported_weights_make_the_same_images_in_plain_diffusers(make_trainer, guided, tmp_path):
    family = FAMILIES[guided]
    options = family.options(num_inference_steps=2)
    trainer = make_trainer(
        pipeline=family.build(), peft_config=attention_lora_config(rank=2, alpha=4), **family.guidance
    )
    trainer.train()
    change_adapters(trainer.model)
    trainer.save_model(tmp_path / "lora")

    pipeline = family.build()
    before = run_pipeline(pipeline, family, options, output_type="latent")
    # the card tells users the guidance in the pipeline's own words
    (call,) = re.findall(
        r"image = pipeline\(\n(.*?)\n\)", (tmp_path / "lora" / "README.md").read_text(), flags=re.DOTALL
    )
    arguments = ast.parse(f"call({call.strip()})", mode="eval").body.keywords
    said = {argument.arg: ast.literal_eval(argument.value) for argument in arguments}
    sizes = {key: said.pop(key) for key in ("height", "width", "num_inference_steps", "max_sequence_length")}
    assert list(sizes.values()) == [16, 16, 3, MAX_SEQUENCE_LENGTH]
    negative_prompt = trainer.policy.negative_prompt(replace(options, negative_prompt=None))
    if negative_prompt is not None:
        assert said.pop("negative_prompt") == negative_prompt == (" " if guided == "qwen_image" else "")
    assert said == family.guidance or said == {"true_cfg_scale": 4.0}
    pipeline.load_lora_weights(tmp_path / "lora")
    after = run_pipeline(pipeline, family, options, output_type="latent")
    trained = run_pipeline(trainer.policy.pipeline, family, options, output_type="latent")
    torch.testing.assert_close(after, trained, rtol=0, atol=1e-5)
    assert relative_change(after, before) > 0.05
    # without the metadata of the file, from a state dict
    bare = family.build()
    bare.load_lora_weights(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(run_pipeline(bare, family, options, output_type="latent"), trained, rtol=0, atol=1e-5)
    trainer.save_model(tmp_path / "again")
    one, other = (tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("lora", "again"))
    assert one.read_bytes() == other.read_bytes()
    rollout = sample(trainer.policy, options, embeds=encode(trainer.policy, options))
    assert torch.allclose(rollout.final_latents, as_sequence(after), rtol=0, atol=1e-5)


def test_a_resumed_training_goes_on_bit_for_bit(make_trainer, guided, tmp_path):
    def train(checkpoint=None):
        trainer = make_trainer(
            pipeline=FAMILIES[guided].build(),
            peft_config=attention_lora_config(rank=2, alpha=4),
            num_iterations=2,
            save_strategy="steps",
            save_steps=1,
            max_steps=3,
            **FAMILIES[guided].guidance,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return dict(trainer.model.named_parameters())

    expected = train()
    first = (tmp_path / "run").rename(tmp_path / "first")
    resumed = train(str(first / "checkpoint-1"))
    assert all(torch.equal(parameter, expected[key]) for key, parameter in resumed.items())


def test_training_raises_the_reward(make_trainer, guided):
    trainer = make_trainer(
        pipeline=FAMILIES[guided].build(),
        num_generations=8,
        top_k=2,
        per_device_train_batch_size=8,
        rollout_batch_size=32,
        per_device_eval_batch_size=30,
        max_steps=8,
        peft_config=attention_lora_config(rank=8, alpha=16),
        **FAMILIES[guided].guidance,
    )
    prompts = [{"prompt": prompt} for prompt in PROMPTS * 10]
    before = trainer.predict(prompts).predictions[:, 0]
    trainer.train()
    change = trainer.predict(prompts).predictions[:, 0] - before  # from the same noise
    assert change.mean() > 3 * change.std(ddof=1) / len(change) ** 0.5


# ------------------------------------------------------------------------------------------------------------- bad input


def test_a_prompt_of_one_token_too_many_is_an_error(guided):
    policy = shared_policy(guided)
    fitting = next("a " * k for k in range(20) if policy.count_tokens("a " * k + "cat") == MAX_SEQUENCE_LENGTH)
    policy.check_prompts([fitting + "cat", *PROMPTS])
    one, other = policy.encode_prompt([fitting + "cat", fitting + "dog"])["prompt_embeds"]
    assert not torch.allclose(one, other)  # the last word still counts
    with pytest.raises(ValueError, match=r"Prompt 1, 'a a .*', has 17 tokens.*=16.*at most \d+"):
        policy.check_prompts(["a cat", fitting + "red cat"])
    with pytest.raises(ValueError, match=r"Prompt 1 is ' '.*Drop it"):
        policy.check_prompts(["a cat", " "])


@pytest.mark.parametrize(
    ("row", "guidance", "message"),
    [
        ("flux", {"negative_prompt": "a dog"}, "'a dog', but the guidance of FluxPipeline is an input"),
        ("qwen_image", {"guidance_scale": 0.5}, "`guidance_scale=0.5` is below 1.*Use 1.0 for none"),
        ("sd3", {"guidance_scale": 0.0}, "`guidance_scale=0.0` is below 1.*Use 1.0 for none"),
        (
            "z_image_unguided",
            {"negative_prompt": ""},
            "'', but `guidance_scale=0.0` means no guidance. Raise it above 0",
        ),
        ("sd3_unguided", {"negative_prompt": ""}, "'', but `guidance_scale=1.0` means no guidance"),
        ("qwen_image", {"negative_prompt": " ".join("a" * 12)}, "`negative_prompt`, 'a a .*', has 17 tokens"),
    ],
)
def test_guidance_that_a_family_does_not_have_is_an_error(make_trainer, row, guidance, message):
    family, policy = FAMILIES[row], shared_policy(row)
    policy.check_guidance(family.options())
    with pytest.raises(ValueError, match=message):
        policy.check_guidance(replace(family.options(), **guidance))
    if "guidance_scale" in guidance:
        with pytest.raises(ValueError, match=message):
            make_trainer(pipeline=policy.pipeline, **(family.guidance | guidance))


def test_guidance_without_embeddings_of_the_negative_prompt_is_an_error(guided):
    policy, options = shared_policy(guided), FAMILIES[guided].options()
    embeds = policy.encode_prompt(PROMPTS)
    with pytest.raises(ValueError, match=r"only 'prompt_embeds'.*`PromptCache"):
        negative_embeds(embeds)
    if policy.has_classifier_free_guidance:
        with pytest.raises(ValueError, match="`PromptCache"):
            policy.predict_velocity(
                policy.transformer, policy.prepare_latents(generators(3), options), torch.tensor(0.7), embeds, options
            )


def test_no_negative_prompt_is_the_empty_one():
    options = replace(FAMILIES["sd3"].options(), negative_prompt=None)
    assert shared_policy("sd3").negative_prompt(options) == ""
    assert shared_policy("sd3").negative_prompt(replace(options, guidance_scale=1.0)) is None
    assert shared_policy("flux").negative_prompt(options) is None
