"""What is copied from the host's memory to the device in a step. The meta device stands for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.diffusion_grpo.families import FAMILIES
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.diffusion_grpo.sde import DYNAMICS, sde_step
from trl_spatial.generation.seeds import image_generator


class Copies(TorchDispatchMode):
    """Counts operations that read from the CPU and write to the meta device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sources, targets = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), output)
        )
        self.count += "cpu" in sources and "meta" in targets
        return output


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("is_scored", [False, True])
def test_a_step_copies_its_coefficients_at_once_and_the_noise_of_all_images_at_once(dynamics, is_scored):
    velocity, latents, next_latents = torch.empty(3, 4, 16, 8, device="meta").unbind(1)[:3]
    kwargs = {"next_latents": next_latents} if is_scored else {"generator": [torch.Generator() for _ in range(3)]}
    with Copies() as copies:
        sde_step(velocity, latents, torch.tensor(0.8), torch.tensor(0.5), 0.7, dynamics=dynamics, **kwargs)
    assert copies.count == (1 if is_scored else 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_velocity_copies_nothing_but_masks_of_padding(name):
    family = FAMILIES[name]
    options, policy = family.options(), family.make_policy()
    cache = PromptCache(policy, "cpu", negative_prompt=policy.negative_prompt(options))
    prompts = ["a cat", "a red cube to the left of a blue sphere"]  # the first one is padded, if the family pads
    embeds = {key: tensor if key.endswith("mask") else tensor.to("meta") for key, tensor in cache.get(prompts).items()}
    policy.transformer.to("meta")
    latents = policy.prepare_latents([image_generator(0, image) for image in range(2)], options)
    counts = []
    for sigma in torch.tensor([0.9, 0.5], device="meta"):
        with Copies() as copies, torch.no_grad():
            policy.predict_velocity(policy.transformer, latents, sigma, embeds, options)
        counts.append(copies.count)
    assert counts[1] == (1 if name.startswith("qwen_image") else 0)  # some models keep their positions from the first


def test_masks_stay_where_they_are_read():
    policy = FAMILIES["qwen_image"].make_policy()
    cache = PromptCache(policy, "cpu", negative_prompt=" ")
    embeds = cache.get(["a cat", "a cat"], device=torch.device("meta"))
    devices = {name: tensor.device.type for name, tensor in embeds.items()}
    assert devices == {name: "cpu" if name.endswith("mask") else "meta" for name in devices} and len(devices) == 4
