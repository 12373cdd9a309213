"""The adapters that are trained."""

from peft import LoraConfig


def attention_lora_config(rank: int = 32, alpha: int = 64) -> LoraConfig:
    """
    LoRA as in [Enhancing Spatial Understanding in Image Generation via Reward
    Modeling](https://huggingface.co/papers/2602.24233): rank 32 on the transformer. Where the paper is silent, as in
    [Flow-GRPO](https://huggingface.co/papers/2505.05470) for Stable Diffusion 3.5: on the attention projections of all
    blocks, for image and text tokens, with Gaussian initial weights. The second attention that some blocks of Stable
    Diffusion 3.5 Medium have is one of them, which Flow-GRPO leaves out. For FLUX.1-dev, Flow-GRPO's code has rank 64 and
    alpha 128, and adapts the feed-forward layers of the double blocks too: 179 million weights in place of 52.

    Args:
        rank (`int`, *optional*, defaults to `32`):
            Rank of the adapters.
        alpha (`int`, *optional*, defaults to `64`):
            Scale of the adapters: their output is multiplied by `alpha / rank`.

    Returns:
        [`~peft.LoraConfig`]: For a diffusers transformer whose attention has diffusers' usual names, as that of every
        family in [`policies.POLICIES`]. Names that a transformer does not have are passed over.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=[
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),  # for image tokens; in single blocks, for all
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),  # for text tokens
            *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),  # Z-Image's name for `attn`
            *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),  # for image tokens alone, in some blocks
        ],
    )
