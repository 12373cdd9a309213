"""DiffusionNFT: online reinforcement learning on the forward process, with the final latents of any sampler."""
