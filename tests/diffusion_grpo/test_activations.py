"""Outputs of blocks that a rollout keeps for training: the same gradients, a forward pass less."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from tests.diffusion_grpo.families import FAMILIES
from tests.diffusion_grpo.test_recomputation import prepared_policy
from trl_spatial.diffusion_grpo.runtime.activations import RolloutActivations, reusing, transformer_blocks
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.seeds import image_generator


PROMPTS = ["a cat", "a red cube", "two lamps", "a dog"]
# Families whose prompts have one length, with several blocks of each kind
SIZES = {
    "flux": dict(num_layers=2, num_single_layers=2),
    "sd3": dict(num_layers=3),  # with guidance: two parts in a batch
    "sd3_unguided": dict(num_layers=3),
}
REUSED = {"reuse_activations": True}
SETTINGS = dict(gradient_checkpointing=True, beta=0.01, num_inference_steps=4)


def make_velocity(name, policy, images):
    """A function that predicts the velocity of some of four images."""
    options = FAMILIES[name].options()
    cache = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options))
    embeds = cache.get([PROMPTS[image] for image in images])
    latents = policy.prepare_latents([image_generator(0, image) for image in images], options)
    return lambda: policy.predict_velocity(policy.transformer, latents, torch.tensor(0.5), embeds, options)


def record(name, policy, batches):
    """What a rollout of four images in these batches keeps."""
    activations = RolloutActivations(policy.transformer, len(PROMPTS), 1)
    for start, stop in batches:
        with torch.no_grad(), activations.recording(0, slice(start, stop)):
            make_velocity(name, policy, range(start, stop))()
    return activations


def train(policy, velocity, outputs):
    with FlopCounterMode(display=False) as counter:
        with reusing(outputs):
            found = velocity()
        found.square().mean().backward()
    gradients = {key: weight.grad for key, weight in policy.transformer.named_parameters() if weight.requires_grad}
    policy.transformer.zero_grad()
    return found.detach(), gradients, counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_bit_for_bit_those_of_checkpointing_without_its_forward_pass(tmp_path, name, dtype):
    transformer, policy = prepared_policy(name, tmp_path, dtype, **SIZES[name])
    transformer.activation_checkpointing_enable()
    activations, velocity = record(name, policy, [(0, 2), (2, 4)]), make_velocity(name, policy, [2, 3])
    expected, expected_gradients, flops = train(policy, velocity, None)
    found, gradients, fewer = train(policy, velocity, activations.of(0, slice(2, 4)))
    assert torch.equal(found, expected) and expected_gradients
    for key, gradient in expected_gradients.items():
        assert torch.equal(gradients[key], gradient), key
    # Oracle: the forward pass, but for the layers before and after the blocks, and the last block
    with torch.no_grad(), FlopCounterMode(transformer, display=False) as counter:
        velocity()
    counts = counter.get_flop_counts()
    names = [key for key, block in transformer.named_modules() if block in transformer_blocks(transformer)[:-1]]
    spared = [sum(counts[f"{type(transformer).__name__}.{key}"].values()) for key in names]
    assert len(spared) >= 2 and flops - fewer == sum(spared)


@pytest.mark.parametrize("name", SIZES)
def test_kept_images_may_be_batched_in_another_way(tmp_path, name):
    transformer, policy = prepared_policy(name, tmp_path, **SIZES[name])
    transformer.activation_checkpointing_enable()
    activations, kept = record(name, policy, [(0, 3), (3, 4)]), [3, 0]
    velocity = make_velocity(name, policy, kept)
    expected, expected_gradients, _ = train(policy, velocity, None)
    sizes = [tensor.nbytes for tensor in activations.tensors]
    activations.select(torch.tensor(kept))
    assert [2 * tensor.nbytes for tensor in activations.tensors] == sizes
    found, gradients, _ = train(policy, velocity, activations.of(0, slice(0, 2)))
    torch.testing.assert_close(found, expected)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-3, atol=1e-6, msg=key)


def test_a_gate_that_is_trained_gets_its_gradient(tmp_path):
    """It is in the arguments of every block, through the embedding of the noise level."""
    transformer, policy = prepared_policy("flux", tmp_path, **SIZES["flux"])
    for key, weight in transformer.named_parameters():
        if "norm1.linear" in key or "time_text_embed" in key or "x_embedder" in key:
            weight.requires_grad_(True)
    transformer.activation_checkpointing_enable()
    activations, velocity = record("flux", policy, [(0, 4)]), make_velocity("flux", policy, range(4))
    _, expected, _ = train(policy, velocity, None)
    _, gradients, _ = train(policy, velocity, activations.of(0, slice(0, 4)))
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-7, msg=key)


class Seen(TrainerCallback):
    """What the buffer keeps when an update has ended, and when evaluation may come."""

    def __init__(self):
        self.activations = []

    def on_step_end(self, args, state, control, **kwargs):
        self.activations.append(self.trainer._buffer.activations)


TRAININGS = {
    "filter": {},
    "all images, a window": dict(
        top_k=None, gradient_accumulation_steps=4, sde_window_size=1, sde_window_range=[0, 2]
    ),
    "two updates per rollout": dict(gradient_accumulation_steps=1, steps_per_generation=2, max_steps=4),
    "scouts, bfloat16": dict(num_scouts=6, scout_steps=2, bf16=True),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_training_is_the_same_and_counts_fewer_passes(make_trainer, make_pipeline, case):
    kwargs, pipeline, found = SETTINGS | dict(rollout_batch_size=2) | TRAININGS[case], make_pipeline(), {}
    for is_reusing in (False, True):
        seen = Seen()
        trainer = make_trainer(
            pipeline=copy.deepcopy(pipeline),
            gradient_checkpointing_kwargs={"reuse_activations": is_reusing},
            callbacks=[seen],
            logging_steps=1,
            **kwargs,
        )
        seen.trainer = trainer
        trainer.train()
        weights = [weight.detach().clone() for weight in trainer.model.parameters() if weight.requires_grad]
        found[is_reusing] = (trainer, weights, [log for log in trainer.state.log_history if "loss" in log])
        assert seen.activations == [None] * trainer.state.max_steps
    (_, expected, before), (trainer, weights, after) = found[False], found[True]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, expected, strict=True))
    assert [log["loss"] for log in before] == [log["loss"] for log in after]
    args = trainer.args
    num_rollouts = args.max_steps // args.num_updates_per_rollout
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_trained_steps
    spared = before[-1]["num_policy_passes"] - after[-1]["num_policy_passes"]
    assert spared == num_rollouts * per_update  # of the first update of each


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("flux", dict(gradient_checkpointing=False), "`gradient_checkpointing` False"),
        ("flux", dict(torch_compile=True), "`torch_compile` True"),
        ("qwen_image", {}, "QwenImagePipeline have different lengths"),
        ("z_image", {}, "ZImagePipeline have different lengths"),
    ],
)
def test_where_nothing_can_be_reused_it_is_refused(make_trainer, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(pipeline=FAMILIES[name].build(), gradient_checkpointing_kwargs=REUSED, **(SETTINGS | kwargs))


def test_sharded_weights_are_refused(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="asks for FSDP2"):
        make_trainer(gradient_checkpointing_kwargs=REUSED, **SETTINGS)
