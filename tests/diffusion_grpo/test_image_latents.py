"""Encoding images, against diffusers' own image-to-image pipelines and the VAE."""

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from tests.diffusion_grpo.families import FAMILIES, GUIDED, MAX_SEQUENCE_LENGTH, shared_policy


IMG2IMG = {
    "flux": FluxImg2ImgPipeline,
    "qwen_image": QwenImageImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "z_image": ZImageImg2ImgPipeline,
}
assert list(IMG2IMG) == GUIDED
HEIGHT, WIDTH = 24, 48


def make_images(num_images=2):
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.mark.parametrize("name", GUIDED)
def test_latents_are_those_of_the_image_to_image_pipeline(name, monkeypatch):
    policy, family = shared_policy(name), FAMILIES[name]
    pipeline = IMG2IMG[name].from_pipe(policy.pipeline)
    # It draws from the VAE's distribution; its mode is all that is compared.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    given = []
    scale_noise = type(pipeline.scheduler).scale_noise

    def record(self, latents, timestep, noise):
        given.append(latents)
        return scale_noise(self, latents, timestep, noise)

    monkeypatch.setattr(type(pipeline.scheduler), "scale_noise", record)
    images = make_images()
    pipeline(
        ["a cat", "the lamp"],
        image=images,
        height=HEIGHT,
        width=WIDTH,
        strength=0.5,
        num_inference_steps=4,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="latent",
        **{key: [value] * 2 if key == "negative_prompt" else value for key, value in family.pipeline_guidance.items()},
    )
    ours = policy.encode_images(images)
    (theirs,) = given
    if name in ("flux", "qwen_image"):
        theirs = policy.pipeline._pack_latents(theirs.squeeze(1), *theirs.squeeze(1).shape)
    else:
        theirs = theirs.flatten(2).transpose(1, 2)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GUIDED)
def test_decoding_gives_what_the_vae_makes_of_the_images(name):
    policy = shared_policy(name)
    images = make_images()
    pixels = policy.pipeline.image_processor.preprocess(images)
    if name == "qwen_image":
        pixels = pixels.unsqueeze(2)
    with torch.no_grad():
        decoded = policy.vae.decode(policy.vae.encode(pixels).latent_dist.mode()).sample
    expected = policy.pipeline.image_processor.postprocess(decoded[:, :, 0] if name == "qwen_image" else decoded)
    latents = policy.encode_images(images)
    ours = policy.decode_latents(latents, FAMILIES[name].options(HEIGHT, WIDTH))
    for image, other in zip(ours, expected, strict=True):  # rounding to 256 levels may move one
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    # the shape of what sampling starts from
    noise = policy.prepare_latents([torch.Generator()] * 2, FAMILIES[name].options(HEIGHT, WIDTH))
    assert latents.shape == noise.shape
    # an image does not depend on its batch
    torch.testing.assert_close(policy.encode_images(images[1:]), latents[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GUIDED)
def test_encoding_is_in_the_type_of_the_vae_under_autocast_too(name):
    policy = FAMILIES[name].make_policy()
    images = make_images()
    expected = policy.encode_images(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy.encode_images(images).equal(expected)
    policy.vae.to(torch.bfloat16)
    assert policy.encode_images(images).dtype == torch.float32
