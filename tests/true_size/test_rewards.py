"""The reward model at true size: true architectures as fake tensors, with the smallest and the largest images of the recipe."""

import pytest
from torch import nn

from tests.true_size.measure import check_against_table
from tests.true_size.rewards import NUM_TEXT_TOKENS, REWARDS, SIDES, build_reward_model, measure_reward
from trl_spatial.diffusion_grpo.runtime.memory import GPU_GIB


pytestmark = pytest.mark.true_size


@pytest.fixture(scope="module", params=REWARDS)
def reward(request):
    """Its name in the table, its model, and what was counted."""
    return request.param, build_reward_model(REWARDS[request.param]), measure_reward(REWARDS[request.param])


def num_adapted(model):
    """Weights of the adapters, of rank 64."""
    linear = [layer for layer in model.backbone.language_model.modules() if isinstance(layer, nn.Linear)]
    return sum(64 * (layer.in_features + layer.out_features) for layer in linear)


def test_training_takes_the_operations_of_its_layers_and_none_of_a_backward_pass_through_the_vision_tower(reward):
    """Oracle: 2 operations a token and weight, and 4 d S² for attention."""
    _, model, counts = reward
    config = model.config.backbone_config
    towers = (model.backbone.language_model.layers, model.backbone.visual.blocks)
    num_weights = [sum(weight.numel() for weight in tower.parameters() if weight.dim() == 2) for tower in towers]
    width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
    for side, num_patches in SIDES.items():
        tokens = num_patches**2 // 4 + NUM_TEXT_TOKENS
        attention = 4 * width * tokens**2 * config.text_config.num_hidden_layers
        language = 2 * num_weights[0] * tokens + attention
        vision = 2 * num_weights[1] * num_patches**2
        vision += 4 * vision_width * num_patches**4 * len(config.vision_config.fullatt_block_indexes)
        score, train = (counts[f"{phase}: {side}"]["flops"] / 8 for phase in ("score", "train"))
        assert score == pytest.approx(language + vision, rel=0.05)  # and attention in windows, and the merged patches
        # Again, and backward, only the language model: attention's backward pass has 5 products, adapters take 4 passes.
        backward = 2 * language + 1.5 * attention + 8 * num_adapted(model) * tokens
        assert train == pytest.approx(score + backward, rel=0.03)
        assert train < score + backward + vision / 2


def test_windows_take_few_calls_of_attention(reward):
    _, model, counts = reward
    depth = model.config.backbone_config.vision_config.depth
    for side in SIDES:
        assert depth <= counts[f"score: {side}"]["num_vision_attentions"] <= 4 * depth


def test_a_micro_batch_of_the_largest_images_fits_on_a_card_of_40_gb(reward):
    _, model, counts = reward
    weights = sum(weight.nbytes for weight in model.parameters())
    num_trained = num_adapted(model) + sum(weight.numel() for weight in model.head.parameters())
    trained = 16 * num_trained  # in float32, with gradients and AdamW
    assert weights + trained + counts["train: 1024"]["peak_bytes"] < GPU_GIB[40] * 2**30


def test_nothing_has_grown(reward):
    name, _, counts = reward
    check_against_table(name, counts)
