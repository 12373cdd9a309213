"""Adapters of float32 beside frozen weights of bfloat16: the numbers of autocast on a CPU, and of the pipeline on CUDA."""

import pytest
import torch
from diffusers.training_utils import cast_training_params

from tests.diffusion_grpo.families import FAMILIES, GUIDED
from trl_spatial import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.runtime.adapters import AdapterLinear
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


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", GUIDED)
def test_adapters_compute_in_the_dtype_of_their_inputs_as_under_autocast(tmp_path, name, gradient_checkpointing):
    """Oracle: PEFT's own layers under autocast, which on a CPU casts matrix products alone."""
    expected, policy = bfloat16_policy(name), bfloat16_policy(name)
    torch.manual_seed(0)
    expected.transformer.requires_grad_(False).add_adapter(attention_lora_config(rank=2))
    cast_training_params(expected.transformer, torch.float32)
    torch.manual_seed(0)
    prepare_transformer(policy, DiffusionGRPOConfig(str(tmp_path), use_cpu=True), attention_lora_config(rank=2))
    for each in (expected, policy):
        randomize_adapters(each.transformer)
        if gradient_checkpointing:
            each.transformer.enable_gradient_checkpointing()
            each.transformer.train()
    velocity, gradients = velocity_and_gradients(name, policy, torch.autocast("cpu", enabled=False))
    reference, others = velocity_and_gradients(name, expected, torch.autocast("cpu", dtype=torch.bfloat16))
    assert torch.equal(velocity, reference)
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, others[key], rtol=0.02, atol=1e-6)
    products = []
    for module in policy.transformer.modules():
        if isinstance(module, AdapterLinear):
            module.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    velocity_and_gradients(name, policy, torch.autocast("cpu", enabled=False))
    assert set(products) == {torch.bfloat16}
