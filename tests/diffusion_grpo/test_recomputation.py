"""Checkpointing that computes less again: the same gradients, fewer products."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.diffusion_grpo.families import FAMILIES, GUIDED
from trl_spatial import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.runtime.model_setup import prepare_transformer
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.diffusion_grpo.runtime.recomputation import UnreadLinear, enable_checkpointing
from trl_spatial.generation.seeds import image_generator


def prepared_policy(name, folder, dtype=torch.float32, peft_config=None, **sizes):
    policy = FAMILIES[name].make_policy(**sizes)
    policy.pipeline.to(dtype)
    args = DiffusionGRPOConfig(str(folder), use_cpu=True, beta=0.0)
    torch.manual_seed(0)
    prepare_transformer(policy, args, peft_config or attention_lora_config(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in policy.transformer.named_parameters():
            if "lora_B" in key:  # new adapters change nothing
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return policy.transformer.train(), policy


def gradients(name, policy):
    options = FAMILIES[name].options()
    embeds = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options)).get(["a cat", "a red cube"])
    latents = policy.prepare_latents([image_generator(0, image) for image in range(2)], options)
    velocity = policy.predict_velocity(policy.transformer, latents, torch.tensor(0.5), embeds, options)
    velocity.square().mean().backward()
    weights = {key: weight for key, weight in policy.transformer.named_parameters() if weight.requires_grad}
    found = {key: weight.grad for key, weight in weights.items()}
    policy.transformer.zero_grad()
    return velocity.detach(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GUIDED)
def test_velocities_and_gradients_are_bit_for_bit_those_without_checkpointing(tmp_path, name, dtype):
    transformer, policy = prepared_policy(name, tmp_path, dtype)
    velocity, expected = gradients(name, policy)
    transformer.activation_checkpointing_enable()
    again, found = gradients(name, policy)
    assert torch.equal(again, velocity) and expected
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


@pytest.mark.parametrize("name", GUIDED)
def test_less_is_computed_again_than_by_diffusers(tmp_path, name):
    transformer, policy = prepared_policy(name, tmp_path)
    counts = []
    for enable in (
        transformer.disable_gradient_checkpointing,
        transformer.activation_checkpointing_enable,
        transformer.enable_gradient_checkpointing,
    ):
        enable()
        with FlopCounterMode(display=False) as counter:
            gradients(name, policy)
        counts.append(counter.get_total_flops())
    without, ours, plain = counts
    assert without < ours < plain
    # FLUX: 4 of 12 in double blocks and 5 of 12 in single ones, beside attention
    has_unread = any(isinstance(module, UnreadLinear) for module in transformer.modules())
    assert has_unread == (name != "z_image")


@pytest.mark.parametrize("target", ["norm1.linear", "ff.net.2", None])
def test_with_other_trained_weights_gradients_are_the_same_too(tmp_path, target):
    """A trained gate reads the products: they are computed again."""
    config = attention_lora_config(rank=2)
    if target is None:
        policy = FAMILIES["flux"].make_policy()
        transformer = prepare_transformer(
            policy, DiffusionGRPOConfig(str(tmp_path), use_cpu=True, beta=0.0), None
        ).train()
    else:
        config.target_modules = {*config.target_modules, target}
        transformer, policy = prepared_policy("flux", tmp_path, peft_config=config)
    _, expected = gradients("flux", policy)
    transformer.activation_checkpointing_enable()
    _, found = gradients("flux", policy)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    assert not any(isinstance(module, UnreadLinear) for module in transformer.modules())


def test_what_is_read_after_all_is_noticed(tmp_path):
    transformer, policy = prepared_policy("flux", tmp_path)
    enable_checkpointing(policy)
    for name, weight in transformer.named_parameters():
        if "norm1.linear" in name:
            weight.requires_grad_(True)
    _, found = gradients("flux", policy)
    assert any(gradient.isnan().any() for gradient in found.values())


def test_quantized_layers_are_left_as_they_are(tmp_path):
    class Packed(nn.Linear):
        """A layer with a forward pass of its own."""

    transformer, policy = prepared_policy("flux", tmp_path)
    layer = transformer.single_transformer_blocks[0].proj_out
    layer.__class__ = Packed
    enable_checkpointing(policy)
    assert type(layer) is Packed
