"""Adapters of float32 beside frozen weights of bfloat16: the numbers of autocast on a CPU, and of the pipeline on CUDA."""

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners import lora
from torch.utils._pytree import tree_map_only

from tests.diffusion_grpo.families import FAMILIES, GUIDED, make_small_trainer, shared_policy
from trl_spatial import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.policies.base import to_sequence
from trl_spatial.diffusion_grpo.runtime.adapters import AdapterLinear, InPlaceLora, adapt_to_inputs
from trl_spatial.diffusion_grpo.runtime.model_setup import prepare_transformer
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator


PROMPTS = ["a red cube to the left of a blue sphere", "a cat"]


def randomize_adapters(transformer):
    """As after training: new adapters change nothing, as their second matrices are 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def bfloat16_policy(name):
    policy = FAMILIES[name].make_policy()
    policy.pipeline.to(torch.bfloat16)
    return policy


def velocity_and_gradients(name, policy, autocast):
    options = FAMILIES[name].options(24, 48)
    embeds = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options)).get(PROMPTS)
    latents = policy.prepare_latents([image_generator(0, image) for image in range(2)], options)
    with autocast:
        velocity = policy.predict_velocity(
            policy.transformer, latents, policy.prepare_sigmas(options)[1], embeds, options
        )
    velocity.square().mean().backward()
    trained = {key: weight.grad for key, weight in policy.transformer.named_parameters() if weight.requires_grad}
    return velocity.detach(), trained


def error(values, truth):
    return (torch.cat([(one.double() - other).flatten() for one, other in zip(values, truth, strict=True)])).norm()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", GUIDED)
def test_adapters_compute_in_the_dtype_of_their_inputs_as_exactly_as_under_autocast(
    tmp_path, name, gradient_checkpointing
):
    """Oracles: PEFT's own layers in float64, and under autocast, which on a CPU casts matrix products alone."""
    exact, rounded, policy = bfloat16_policy(name), bfloat16_policy(name), bfloat16_policy(name)
    exact.pipeline.to(torch.float64)
    for each, dtype in ((exact, torch.float64), (rounded, torch.float32)):
        torch.manual_seed(0)
        each.transformer.requires_grad_(False).add_adapter(attention_lora_config(rank=2))
        cast_training_params(each.transformer, dtype)
    torch.manual_seed(0)
    prepare_transformer(policy, DiffusionGRPOConfig(str(tmp_path), use_cpu=True), attention_lora_config(rank=2))
    for each in (exact, rounded, policy):
        randomize_adapters(each.transformer)
        if gradient_checkpointing:
            each.transformer.enable_gradient_checkpointing()
            each.transformer.train()
    plain = torch.autocast("cpu", enabled=False)
    velocity, gradients = velocity_and_gradients(name, policy, plain)
    reference, others = velocity_and_gradients(name, rounded, torch.autocast("cpu", dtype=torch.bfloat16))
    truth, slopes = velocity_and_gradients(name, exact, plain)
    assert 0 < error([velocity], [truth]) < 1.2 * error([reference], [truth])
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    slopes = {key: slopes[key] for key in gradients}  # without idle ones
    ours, theirs, size = (
        error([grads[key] * scale for key in slopes], slopes.values())
        for grads, scale in ((gradients, 1), (others, 1), (slopes, 0))
    )
    assert 0 < ours < 1.2 * theirs < 1.2 * size
    products = []
    for module in policy.transformer.modules():
        if isinstance(module, AdapterLinear):
            module.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    velocity_and_gradients(name, policy, plain)
    assert set(products) == {torch.bfloat16}


def test_an_adapter_is_added_in_place_as_peft_adds_it():
    """Oracle: PEFT's layer, in float64."""
    torch.manual_seed(0)
    layer = lora.Linear(
        torch.nn.Linear(6, 5), "default", config=LoraConfig(r=2, lora_alpha=6), r=2, lora_alpha=6
    ).double()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.requires_grad_(False)
    inputs = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weights = [inputs, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    expected = layer(inputs)
    slopes = torch.autograd.grad(expected.sin().sum(), weights)
    adapt_to_inputs(layer)
    assert type(layer) is InPlaceLora
    torch.testing.assert_close(layer(inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(layer(inputs).sin().sum(), weights), slopes)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(inputs), layer.base_layer(inputs))
    layer.enable_adapters(True)
    layer.merge()
    torch.testing.assert_close(layer(inputs), expected)


# Autocast as it is on CUDA


@pytest.fixture
def casts(monkeypatch):
    """
    Autocast runs in float32 and returns float32 what CUDA's does, beside matrix products in bfloat16. The list of the
    functions that did so.
    """
    called = []

    def in_float32(function):
        def call(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                called.append(function.__name__)
                args, kwargs = tree_map_only(
                    torch.Tensor,
                    lambda tensor: tensor.float() if tensor.is_floating_point() else tensor,
                    (args, kwargs),
                )
            return function(*args, **kwargs)

        return call

    for owner, names in (
        (torch.nn.functional, ("layer_norm", "rms_norm", "group_norm", "softmax")),
        (torch, ("norm", "softmax", "sum", "pow", "exp", "rsqrt")),
        (torch.Tensor, ("norm", "softmax", "sum", "pow", "exp", "rsqrt")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, in_float32(getattr(owner, name)))
    return called


def make_trainer(name, folder, pipeline, peft_config, **kwargs):
    return make_small_trainer(name, folder, pipeline, peft_config, bf16=True, use_cpu=True, **kwargs)


@pytest.mark.parametrize("name", GUIDED)
def test_velocities_under_cudas_autocast_are_bit_for_bit_the_pipelines(tmp_path, name, monkeypatch, casts):
    family = FAMILIES[name]
    pipeline, steps = family.build().to(torch.bfloat16), []
    step = pipeline.scheduler.step
    with monkeypatch.context() as patched:
        patched.setattr(
            pipeline.scheduler, "step", lambda *args, **kwargs: (steps.append(args), step(*args, **kwargs))[1]
        )
        guidance = {key: value for key, value in family.pipeline_guidance.items() if key != "negative_prompt"}
        if len(guidance) < len(family.pipeline_guidance):  # what a training has, which names none
            guidance["negative_prompt"] = shared_policy(name).default_negative_prompt
        pipeline(
            [PROMPTS[1]], height=24, width=48, num_inference_steps=4, max_sequence_length=24,
            generator=torch.Generator().manual_seed(0), output_type="latent", **guidance,
        )  # fmt: skip
    trainer = make_trainer(name, tmp_path, pipeline, attention_lora_config(rank=2), learning_rate=0.0)
    trainer.train()  # which wraps the model
    embeds, sigmas = trainer.prompt_cache.get([PROMPTS[1]]), trainer._sigmas
    assert len(steps) == 4
    with torch.no_grad():
        for sigma, (expected, _, latents) in zip(sigmas[:-1], steps, strict=True):
            with trainer.accelerator.autocast():
                velocity = trainer.policy.predict_velocity(
                    trainer.model, as_sequence(latents).float(), sigma, embeds, trainer._options
                )
            assert torch.equal(velocity, as_sequence(expected).float())
    assert not casts


def as_sequence(latents):
    """Latents that a pipeline has as an image, `(n, num_channels, rows, columns)`, in our form."""
    return latents if latents.ndim == 3 else to_sequence(latents)


@pytest.mark.parametrize(("name", "is_full"), [*[(name, False) for name in GUIDED], ("flux", True)])
def test_the_first_ratio_under_cudas_autocast_is_1(tmp_path, name, is_full, casts):
    pipeline = FAMILIES[name].build().to(torch.bfloat16)
    trainer = make_trainer(
        name,
        tmp_path,
        pipeline,
        None if is_full else attention_lora_config(rank=2),
        gradient_checkpointing=True,
        beta=0.0 if is_full else 0.01,
        num_iterations=2,
    )
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "loss" in log]
    assert (first["ratio/mean"], first["ratio/std"]) == (1.0, 0.0)
    assert first["grad_norm"] > 0 and second["ratio/std"] > 0
    assert bool(casts) == is_full  # all weights in float32: autocast is for them
