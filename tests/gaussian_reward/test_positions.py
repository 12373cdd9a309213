"""Positions for all rows at once are those that transformers computes row by row."""

import pytest
import torch

from trl_spatial.gaussian_reward.positions import image_text_positions


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_positions_are_those_of_transformers(make_image_text_model, processor, family, prompts, images, padding_side):
    backbone = make_image_text_model(family).model
    batch = processor(prompts, images, padding_side=padding_side)
    expected, _ = backbone.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    positions = image_text_positions(
        batch["attention_mask"],
        batch["mm_token_type_ids"],
        batch["image_grid_thw"],
        processor.image_processor.merge_size,
    )
    is_token = batch["attention_mask"] == 1
    assert not is_token.all() and positions.shape == expected.shape
    assert torch.equal(positions[:, is_token], expected[:, is_token])
    assert len({tuple(grid) for grid in batch["image_grid_thw"].tolist()}) > 3  # broad, high and square images
