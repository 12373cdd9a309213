"""Families of text-to-image models that can be trained. A family is one file here and one line of `POLICIES`."""

from importlib import import_module
from typing import Any

from .base import DiffusionPolicy, SamplingOptions


# class of the diffusers pipeline: module and class of its policy, imported when it is used
POLICIES = {
    "FluxPipeline": "flux:FluxPolicy",
    "QwenImagePipeline": "qwen_image:QwenImagePolicy",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3Policy",
    "ZImagePipeline": "z_image:ZImagePolicy",
}

__all__ = ["POLICIES", "DiffusionPolicy", "SamplingOptions", "make_policy"]


def make_policy(pipeline: Any, *, max_sequence_length: int = 512) -> DiffusionPolicy:
    """
    Wraps a diffusers pipeline into the policy of its family.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of one of the classes in `POLICIES`.
        max_sequence_length (`int`, *optional*, defaults to `512`):
            The most tokens a prompt may have, and the number to which a family of fixed length pads it.

    Raises:
        `ValueError`: If the pipeline's class is not known; the message lists the known ones.
    """
    name = type(pipeline).__name__
    if name not in POLICIES:
        raise ValueError(
            f"There is no policy for the pipeline class {name!r}; available: {', '.join(map(repr, sorted(POLICIES)))}. Pass "
            "such a pipeline, or add a family to `trl_spatial.diffusion_grpo.policies.POLICIES`."
        )
    module, class_name = POLICIES[name].split(":")
    policy_class = getattr(import_module(f".{module}", __name__), class_name)
    return policy_class(pipeline, max_sequence_length=max_sequence_length)
