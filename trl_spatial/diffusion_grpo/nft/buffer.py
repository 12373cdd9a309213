"""The kept images of a rollout, mixed with noise for training."""

from dataclasses import dataclass

import torch

from ...generation.seeds import image_generator
from ..runtime.buffer import RolloutBuffer
from ..runtime.prompt_cache import PromptCache


@dataclass
class NoisyImages:
    """A batch of `n` images, each at one of its noise levels: the input of the loss."""

    embeds: dict[str, torch.Tensor]  # prompt embeddings, a row per image
    latents: torch.Tensor  # mixed with noise: (n, image_seq_len, num_channels), float32
    sigmas: torch.Tensor  # noise level of each image: (n,), float32
    targets: torch.Tensor  # the true velocity, noise minus image: (n, image_seq_len, num_channels)
    advantages: torch.Tensor  # (n,), float32


@dataclass(kw_only=True)
class FinalLatentsBuffer(RolloutBuffer):
    """
    A [`RolloutBuffer`] with the final latents of each image. Noise levels and noise follow from the image's number, so they
    depend on neither its batch nor its process.
    """

    latents: torch.Tensor  # (n, image_seq_len, num_channels), float32
    sigmas: torch.Tensor  # noise levels to draw from, (num_inference_steps,), float32
    num_levels: int  # how many of them each image is trained on per iteration
    seed: int
    rollout_index: int
    first: int  # number of the first image among those of all processes

    def batch_steps(self, position: int, prompt_cache: PromptCache) -> list[NoisyImages]:
        """Mixes the batch at a position with noise, once for each noise level."""
        rows, iteration = self.rows(position), position // self.num_batches
        latents = self.latents[rows]
        levels, noises = [], []
        for image in range(rows.start, rows.stop):
            # One number more than the generator that draws an image, so it is a different one
            generator = image_generator(self.seed, self.rollout_index, self.first + image, iteration, 0)
            levels.append(torch.randperm(len(self.sigmas), generator=generator)[: self.num_levels])
            noises.append(torch.randn(self.num_levels, *latents.shape[1:], generator=generator))
        sigmas = self.sigmas[torch.stack(levels).to(self.sigmas.device)]  # (batch_size, num_levels)
        noise = torch.stack(noises).to(latents.device)  # (batch_size, num_levels, image_seq_len, num_channels)
        embeds = prompt_cache.get(self.prompts[rows])
        return [
            NoisyImages(
                embeds=embeds,
                latents=torch.lerp(latents, noise[:, level], sigmas[:, level, None, None]),
                sigmas=sigmas[:, level],
                targets=noise[:, level] - latents,
                advantages=self.advantages[rows],
            )
            for level in range(self.num_levels)
        ]
