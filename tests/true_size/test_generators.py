"""
The recipes of the generators at true size: true architectures as fake tensors in the trainer's own code. What the phases of a
run take is what `--estimate`, a formula and `recipes/bench/true_size.json` say.
"""

import json

import pytest

from tests.true_size.generators import RECIPES, measure_generator, parse
from tests.true_size.measure import GENERATORS, TABLE
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.runtime.architectures import load_architecture
from trl_spatial.diffusion_grpo.runtime.memory import GPU_GIB, MemoryModel, reward_model_bytes


GIB = 2**30
# FLUX.1 takes half a minute, the others four minutes together
RECIPE_PARAMS = [
    recipe if recipe == "grpo_flux" else pytest.param(recipe, marks=pytest.mark.true_size) for recipe in GENERATORS
]


@pytest.fixture(scope="module", params=RECIPE_PARAMS)
def recipe(request, tmp_path_factory):
    """Its name, its arguments, its model of memory, and what was counted."""
    folder = tmp_path_factory.mktemp(request.param)
    _, model_args, args = parse(request.param, folder)
    lora = attention_lora_config(rank=model_args.lora_r, alpha=model_args.lora_alpha)
    memory = MemoryModel(load_architecture(model_args.model_name_or_path), args, lora)
    return request.param, args, memory, measure_generator(request.param, folder)


def test_every_phase_takes_the_memory_that_is_estimated(recipe):
    _, _, memory, counts = recipe
    parts = memory.estimate().parts
    expected = {
        "sample": parts["sampling step"],
        "decode": parts["decoding"],
        "reference": None,  # a part of training, which needs more
        "train": parts["training step"] + parts["trained weights"],  # and their gradients
        "evaluate: sample": parts["sampling step in evaluation"],
        "evaluate: decode": parts["decoding in evaluation"],
    }
    assert expected.keys() == counts.keys()
    for phase, num_bytes in expected.items():
        if num_bytes is not None:
            # beside it, the sampler's own tensors
            assert counts[phase]["peak_bytes"] == pytest.approx(num_bytes, rel=0.03, abs=GIB / 10), phase
    assert counts["reference"]["peak_bytes"] < counts["train"]["peak_bytes"]


def test_a_velocity_takes_the_operations_of_its_layers(recipe):
    """Oracle: 24 d² operations a token and layer for attention's projections and the feed-forward layer, and 4 d S² for attention."""
    _, _, memory, counts = recipe
    config, passes = memory.transformer.config, memory.policy.num_passes(memory._options)
    image = memory._latents(1, memory._options).shape[1]  # tokens, or positions of which 4 make a token
    text = memory.policy.embed_shapes(1)["prompt_embeds"][1]
    image_only: list[tuple[int, int]] = []
    match type(memory.policy).__name__:
        case "FluxPolicy":
            layers = [(config.num_attention_heads * config.attention_head_dim, image + text)] * (
                config.num_layers + config.num_single_layers
            )
        case "QwenImagePolicy":
            layers = [(config.num_attention_heads * config.attention_head_dim, image + text)] * config.num_layers
        case "ZImagePolicy":
            image //= 4
            layers = [(config.dim, image + text)] * config.n_layers
            layers += [(config.dim, image), (config.dim, text)] * config.n_refiner_layers
        case "StableDiffusion3Policy":
            image //= 4
            width = config.num_attention_heads * config.attention_head_dim
            layers = [(width, image + text)] * config.num_layers
            image_only = [(width, image)] * len(config.dual_attention_layers)  # attention of the image alone: 8 d²
    attention = passes * sum(4 * width * tokens**2 for width, tokens in layers + image_only)
    products = sum(24 * width**2 * tokens for width, tokens in layers)
    products += sum(8 * width**2 * tokens for width, tokens in image_only)
    forward = passes * products + attention
    sample, train = (counts[phase]["flops"] / counts[phase]["images"] for phase in ("sample", "train"))
    assert sample == pytest.approx(forward, rel=0.04)  # and what happens once per image, and the adapters
    # forward, again, and backward: as much for the inputs, the adapters' weights, and attention's backward pass of 5 products
    assert train == pytest.approx(3 * sample + 1.5 * attention, rel=0.02)
    assert counts["reference"]["flops"] / counts["reference"]["images"] == pytest.approx(sample, rel=0.02)
    num_attentions = counts["sample"]["num_attentions"]
    assert num_attentions == counts["reference"]["num_attentions"]
    assert counts["train"]["num_attentions"] == 2 * num_attentions
    assert num_attentions <= 2 * len(layers + image_only)  # with guidance in two passes


def test_nothing_has_grown(recipe):
    name, _, _, counts = recipe
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))[name]
    assert counts.keys() == recorded.keys()
    for phase, record in recorded.items():
        for key, value in record.items():
            assert counts[phase][key] == pytest.approx(value, rel=0.01), (
                f"{phase}, {key}: see tests/true_size/measure.py"
            )


# What README.md says of a card: quantization, and whether SpatialScore-7B is beside the model
CARDS = {
    "grpo_flux": {24: [("nf4", False)], 40: [(None, False), ("nf4", True)], 80: [(None, True)]},
    "grpo_flux_fast": {24: [("nf4", False)], 40: [(None, False), ("nf4", True)], 80: [(None, True)]},
    "grpo_qwen_image": {40: [("nf4", False), ("int8", False)], 80: [(None, True)]},
    "grpo_sd3": {24: [(None, False)]},
    "grpo_z_image": {24: [(None, False)]},
}
MACHINES = (
    "| one GPU of 24 GB | `grpo_sd3` and `grpo_z_image`; `grpo_flux` with `--load_in_4bit`; the reward elsewhere |",
    "| one GPU of 40 GB | `grpo_flux`, or `grpo_flux` in 4 bits with SpatialScore beside it; `grpo_qwen_image` in 4 or 8 bits with "
    "the reward elsewhere |",
    "| one GPU of 80 GB | `grpo_flux` and `grpo_qwen_image` with SpatialScore beside them |",
)


def test_the_readme_says_what_is_estimated(recipe):
    name, _, memory, _ = recipe
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    totals = [memory.estimate(quantization=quantization).total for quantization in (None, "int8", "nf4")]
    totals.append(memory.estimate(gradient_checkpointing=False).total)
    assert f"| `{name}` | {' | '.join(f'{total / GIB:.1f}' for total in totals)} |" in readme
    assert all(line in readme for line in MACHINES)
    reward = reward_model_bytes(["SpatialScore-7B"])
    assert f"takes {reward / GIB:.1f} more" in readme
    assert f"{8 * memory.host_bytes() / GIB:.0f} for `{name.removesuffix('_fast')}`" in readme.replace(
        "GiB for", "for"
    )
    for card, runs in CARDS[name].items():
        for quantization, has_reward in runs:
            estimate = memory.estimate(quantization=quantization)
            assert estimate.total + has_reward * reward <= GPU_GIB[card] * GIB, (card, quantization, estimate.phases)
