"""Attention of the vision tower in few calls: what transformers computes one window at a time, gradients included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModel, Qwen2VLConfig

from trl_spatial.gaussian_reward.modeling import GaussianRewardModel
from trl_spatial.gaussian_reward.vision_attention import PACKED_SDPA, pack, use_packed_sdpa


PATCH_SIZE, WINDOW_SIZE, DEPTH = 8, 32, 3  # windows of 4 x 4 patches
MIXED = [[1, 10, 6], [1, 4, 4], [1, 14, 10], [1, 10, 6], [1, 2, 18]]  # frames, rows and columns of patches


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen2_vl"])
def backbone(request, make_image_text_model):
    """A tiny backbone of each family, as transformers makes it."""
    if request.param != "qwen2_vl":
        return make_image_text_model(request.param, vision_depth=DEPTH).model.eval()
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": DEPTH, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH_SIZE}
    torch.manual_seed(0)
    return AutoModel.from_config(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


def packed(backbone):
    backbone = copy.deepcopy(backbone)
    use_packed_sdpa(backbone)
    return backbone


def patches(grid):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH_SIZE**2, generator=generator)


def count_calls(monkeypatch, tower, grid):
    """Numbers of sequences and their lengths, of every call of the attention of each block."""
    calls, attend = [], F.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        calls[-1].append((query.shape[0], query.shape[2]))
        return attend(query, *args, **kwargs)

    hooks = [block.register_forward_pre_hook(lambda *_: calls.append([])) for block in tower.blocks]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", counted)
        tower(patches(grid), grid_thw=grid)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("grid", [MIXED, MIXED[:1], [[1, 10, 6]] * 3, [[2, 6, 4], [1, 6, 4]]])
def test_outputs_and_gradients_are_those_of_one_window_at_a_time(backbone, grid):
    grid = torch.tensor(grid)
    results = []
    for tower in (backbone.visual, packed(backbone).visual):
        pixels = patches(grid).requires_grad_()
        output = tower(pixels, grid_thw=grid).pooler_output
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output * weights).sum().backward()
        gradients = {name: param.grad for name, param in tower.named_parameters() if param.grad is not None}
        results.append({"output": output.detach(), "pixels": pixels.grad} | gradients)
    plain, ours = results
    assert plain.keys() == ours.keys() and len(plain) > 10
    for name, tensor in plain.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6 * max(1, tensor.abs().max()), name


def test_a_tower_trains_after_it_has_scored_the_same_images(backbone):
    """What is kept of an image is made in inference mode, in which nothing can be saved for a backward pass."""
    tower, grid = packed(backbone).visual, torch.tensor([[1, 6, 22]])
    with torch.inference_mode():
        expected = tower(patches(grid), grid_thw=grid).pooler_output
    output = tower(patches(grid), grid_thw=grid).pooler_output
    output.sum().backward()
    assert torch.equal(output, expected) and tower.patch_embed.proj.weight.grad is not None


def test_few_calls_for_images_of_one_size(backbone, monkeypatch):
    """10 x 6 patches: 2 windows of 4 x 4, and edges of 4 x 2, 2 x 4 and 2 x 2; 8 and 8 are one length."""
    has_windows = backbone.config.model_type == "qwen2_5_vl"
    windows = [(2, 16), (3, 8), (1, 4)] if has_windows else None
    for num_images in (1, 2, 5):
        grid = torch.tensor([[1, 10, 6]] * num_images)
        calls = count_calls(monkeypatch, packed(backbone).visual, grid)
        full = [(num_images, 60)]
        assert calls[-1] == full
        for block in calls[:-1]:
            assert block == ([(num_images * count, length) for count, length in windows] if has_windows else full)
        plain = count_calls(monkeypatch, backbone.visual, grid)
        assert {sum(length for _, length in block) for block in plain} == {60 * num_images}


def test_a_call_for_each_size_of_a_mixed_batch(backbone, monkeypatch):
    calls = count_calls(monkeypatch, packed(backbone).visual, torch.tensor(MIXED))
    assert calls[-1] == [(1, 140), (2, 60), (1, 36), (1, 16)]


def test_blocks_read_nothing_back_from_the_device(backbone):
    """A tensor on the meta device has no values: whoever asks for one, as `tolist` and `item` do, raises an error."""
    tower = packed(backbone).visual.to("meta")
    grid = torch.tensor(MIXED)
    calls = []
    for block in tower.blocks:
        block.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    arguments = {}
    if backbone.config.model_type == "qwen3_vl":  # how its positions are interpolated is not ours
        num_patches = int(grid.prod(-1).sum())
        arguments = {
            "interp_indices": torch.zeros(num_patches, 4, dtype=torch.long, device="meta"),
            "interp_weights": torch.zeros(num_patches, 4, device="meta"),
        }
    tower(patches(grid).to("meta"), grid_thw=grid, **arguments)
    assert len(calls) == DEPTH


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 5, 2, 3, 5], [7]])
def test_a_packing_puts_segments_of_one_length_side_by_side_and_back(lengths):
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    shuffled = segment[torch.randperm(len(segment), generator=torch.Generator().manual_seed(0))]
    for numbers in (segment, shuffled):
        groups, order, inverse = pack(numbers, torch.tensor(lengths), torch.device("cpu"))
        assert sorted(length for count, length in groups for _ in range(count)) == sorted(lengths)
        assert len({length for _, length in groups}) == len(groups)
        placed = numbers if order is None else numbers[order]
        chunks = placed.split([length for count, length in groups for _ in range(count)])
        assert all(len(chunk.unique()) == 1 for chunk in chunks)
        if order is not None:
            assert torch.equal(placed[inverse], numbers)
    if len(set(lengths)) == 1:
        assert pack(segment, torch.tensor(lengths), torch.device("cpu")).order is None


def test_other_attention_functions_are_left_alone(make_reward_model, processor, prompts, images, family):
    eager = make_reward_model(family, attn_implementation="eager")
    assert eager.backbone.visual.config._attn_implementation == "eager"

    model = make_reward_model(family)
    batch = processor(prompts, images)
    with torch.no_grad():
        expected = model(**batch).mean
        assert model.backbone.visual.config._attn_implementation == PACKED_SDPA
        model.set_attn_implementation("eager")  # later, by transformers' own means
        assert model.backbone.visual.config._attn_implementation == "eager"
        assert torch.allclose(model(**batch).mean, expected, atol=1e-5)

    seen = []

    def flash(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, **kwargs):
        seen.append((cu_seq_lens_q, max_length_q))
        return query.transpose(1, 2), None

    AttentionInterface.register("flash_for_test", flash)
    model.backbone.visual.config._attn_implementation = "flash_for_test"
    with torch.no_grad():
        model(**batch)
    # boundaries of the windows or images, as FlashAttention needs them
    for boundaries, longest in seen:
        assert boundaries.dtype == torch.int32 and boundaries.diff().max() == longest
        assert boundaries[-1] == len(batch["pixel_values"])


def test_a_model_can_be_built_again_from_its_configuration(make_reward_model, family):
    model = make_reward_model(family)
    again = GaussianRewardModel(type(model.config).from_dict(model.config.to_dict()))
    assert again.backbone.visual.config._attn_implementation == PACKED_SDPA
    assert PACKED_SDPA not in str(model.config.to_dict()) + str(model.backbone.config.to_dict())
    again = GaussianRewardModel(model.config)
    assert {name: param.shape for name, param in again.named_parameters()} == {
        name: param.shape for name, param in model.named_parameters()
    }
