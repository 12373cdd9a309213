"""
The recipes of the generators at true size: true architectures as fake tensors in the trainer's own code. What the phases of a
run take is what `--estimate`, a formula and `recipes/bench/true_size.json` say.
"""

import itertools
import json

import pytest

from recipes.gpu.prediction import RECOMPUTED
from tests.true_size.fakes import like_cuda
from tests.true_size.generators import RECIPES, TrueSize, measure_generator, parse
from tests.true_size.measure import GENERATORS, TABLE, check_against_table
from trl_spatial.diffusion_grpo import DiffusionNFTConfig
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
    memory = MemoryModel(load_architecture(model_args.model_name_or_path), args, model_args.peft_config)
    return request.param, args, memory, measure_generator(request.param, folder)


def test_every_phase_takes_the_memory_that_is_estimated(recipe):
    _, _, memory, counts = recipe
    estimate, weights = memory.estimate(), counts["weights"]
    for part, num_bytes in weights.items():
        assert estimate.parts[part] == pytest.approx(num_bytes, rel=1e-3), part
    # What is there in every phase, gradients and AdamW among it
    state = sum(weights.values()) - weights["text encoders"] + 3 * weights["trained weights"]
    state += estimate.parts["prompt embeddings"] + estimate.parts.get("latents of a rollout", 0)
    peaks = {phase: count["peak_bytes"] for phase, count in counts.items() if phase not in ("weights", "reference")}
    assert peaks["train"] > counts["reference"]["peak_bytes"]
    peaks["encode"] = weights["text encoders"]
    assert peaks.keys() == estimate.phases.keys()
    for phase, num_bytes in peaks.items():
        # beside it, the sampler's own tensors
        assert estimate.phases[phase] - state == pytest.approx(num_bytes, rel=0.03, abs=GIB / 10), phase


def test_a_velocity_takes_the_operations_of_its_layers(recipe):
    """
    Oracle: 24 d² operations a token and layer for attention's projections and the feed-forward layer, and 4 d S² for attention.
    Checkpointing computes all again but the last layer and, where a policy names them, the last products of each: 8 d² of these
    operations, or 10 d² where attention and the feed-forward layer share one.
    """
    name, args, memory, counts = recipe
    config, passes = memory.transformer.config, memory.policy.num_passes(memory._options)
    image = memory._latents(1, memory._options).shape[1]  # tokens, or positions of which 4 make a token
    text = memory.policy.embed_shapes(1)["prompt_embeds"][1]
    image_only: list[tuple[int, int]] = []
    unread = [8 if memory.policy.unread_outputs else 0]
    match type(memory.policy).__name__:
        case "FluxPolicy":
            layers = [(config.num_attention_heads * config.attention_head_dim, image + text)] * (
                config.num_layers + config.num_single_layers
            )
            unread = [8] * config.num_layers + [10] * config.num_single_layers
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
    reference, train = (counts[phase]["flops"] / counts[phase]["images"] for phase in ("reference", "train"))
    num_others = 2 if isinstance(args, DiffusionNFTConfig) else 1  # the reference, and the old policy
    assert reference == pytest.approx(num_others * forward, rel=0.04)  # and what happens once per image
    sample = counts["sample"]["flops"] / counts["sample"]["images"] if "sample" in counts else reference
    assert sample == pytest.approx(reference / num_others, rel=0.02)  # and the adapters
    # forward, again, and backward: as much for the inputs, the adapters' weights, and attention's backward pass of 5 products
    last = config.n_layers - 1 if type(memory.policy).__name__ == "ZImagePolicy" else len(layers) - 1
    width, tokens = layers[last]
    left_out = passes * (24 * width**2 * tokens + 4 * width * tokens**2)
    left_out += passes * sum(
        share * width**2 * tokens
        for number, (share, (width, tokens)) in enumerate(zip(itertools.cycle(unread), layers, strict=False))
        if number != last
    )
    assert train == pytest.approx(3 * sample + 1.5 * attention - left_out, rel=0.02)
    if name in RECOMPUTED:
        assert RECOMPUTED[name] == pytest.approx(1 - left_out / sample, abs=0.01)
    num_attentions = counts.get("sample", counts["reference"])["num_attentions"]
    assert counts["reference"]["num_attentions"] == num_others * num_attentions
    assert counts["train"]["num_attentions"] == 2 * num_attentions - num_attentions // len(layers + image_only)
    assert num_attentions <= 2 * len(layers + image_only)  # with guidance in two passes


def test_nothing_has_grown(recipe):
    name, _, _, counts = recipe
    check_against_table(name, counts)


@pytest.mark.true_size
def test_reused_activations_spare_a_forward_pass(tmp_path):
    """Oracle: an output of every block of FLUX.1 but the last is 1,024 + 512 tokens of 3,072 channels in bfloat16."""
    reused = ("--gradient_checkpointing_kwargs", '{"reuse_activations": true}')
    _, model_args, args = parse("grpo_flux", tmp_path, "no", *reused)
    memory = MemoryModel(load_architecture(model_args.model_name_or_path), args, model_args.peft_config)
    with like_cuda():
        counts, kept = TrueSize("grpo_flux", tmp_path, *reused).train_reusing()
    per_image = 56 * (1024 + 512) * 3072 * 2
    assert sum(tensor.nbytes for tensor in kept) == args.per_device_train_batch_size * per_image
    estimate = memory.estimate()
    num_steps = args.num_prompts_per_device * args.num_trained_steps
    assert estimate.parts["activations of a rollout"] == num_steps * args.num_generations * per_image
    assert estimate.parts["training step"] == pytest.approx(counts["peak_bytes"], rel=0.03)
    plain = json.loads(TABLE.read_text(encoding="utf-8"))["grpo_flux"]
    spared = plain["train"]["flops"] / plain["train"]["images"] - counts["flops"] / args.per_device_train_batch_size
    assert spared == pytest.approx(56 / 57 * plain["sample"]["flops"] / plain["sample"]["images"], rel=0.02)
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert f"needs {per_image / GIB:.2f} GiB per".replace("0.", ".") in readme.replace("\n", " ")
    assert f"{24 * 2 * per_image / GIB:.1f} GiB during" in readme


# What README.md says of a card: quantization, and whether SpatialScore-7B is beside the model
_FLUX = {24: [("nf4", False)], 40: [(None, False), ("nf4", True)], 80: [(None, True)]}
CARDS = {
    "grpo_flux": _FLUX,
    "grpo_flux_fast": _FLUX,
    "grpo_qwen_image": {40: [("nf4", False), ("int8", False)], 80: [(None, True)]},
    "grpo_sd3": {24: [(None, False)], 80: [(None, True)]},
    "grpo_z_image": {24: [(None, False)], 80: [(None, True)]},
    "nft_flux": _FLUX,
    "dpo_flux": _FLUX,
}
MACHINES = (
    "| one GPU of 24 GB | `grpo_sd3` and `grpo_z_image`; `grpo_flux`, `nft_flux` and `dpo_flux` with `--load_in_4bit`; the reward "
    "elsewhere |",
    "| one GPU of 40 GB | `grpo_flux`, `nft_flux` and `dpo_flux`, or these in 4 bits with SpatialScore beside them; `grpo_qwen_image` "
    "in 4 or 8 bits with the reward elsewhere |",
    "| one GPU of 80 GB | all of these recipes with SpatialScore beside them |",
)


def test_the_readme_says_what_is_estimated(recipe):
    name, _, memory, _ = recipe
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    estimates = [memory.estimate(quantization=quantization) for quantization in (None, "int8", "nf4")]
    assert all((estimate.total == estimate.phases["encode"]) == (name != "grpo_sd3") for estimate in estimates)
    totals = [estimate.total for estimate in estimates]
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
