"""What rows begin with is computed once, and every row keeps its score and its gradients."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from trl_spatial.gaussian_reward.shared_prefixes import SHARED_SDPA, Segment, batch_segments, share_prefixes


@pytest.fixture
def rows(prompts, images):
    """Rows of three images: three prompts for one, a row that is there twice, and one row by itself."""
    order = [0, 0, 0, 1, 1, 2]
    return [prompts[i] for i in (0, 4, 2, 1, 1, 3)], [images[i] for i in order], order


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_following_the_parents_of_a_row_gives_the_row(processor, rows, padding_side):
    prompts, images, order = rows
    batch = processor(prompts, images, padding_side=padding_side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shared = share_prefixes(ids, mask, batch["image_index"].tolist(), processor.image_token_id)
    parts = ids.flatten()[shared.source].split([segment.length for segment in shared.segments])
    written = [
        torch.cat([parts[i] for i in (*segment.parents, number)]).tolist()
        for number, segment in enumerate(shared.segments)
    ]
    for row in range(len(order)):
        tokens = ids[row][mask[row] == 1]
        assert tokens.tolist() in written
        assert torch.equal(ids.flatten()[shared.source][shared.place[row][mask[row] == 1]], tokens)
    # no image is there twice, nor what precedes the first one
    image_tokens = ids.flatten()[shared.source] == processor.image_token_id
    assert image_tokens.sum() == (batch["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).sum()
    assert parts[0].tolist() == ids[0][mask[0] == 1].tolist()[: image_tokens.nonzero()[0]]
    assert all(segment.parents[0] == 0 for segment in shared.segments[1:])


@pytest.mark.parametrize("num_segments", [1, 2, 9, 40])
def test_every_token_attends_to_its_parents_and_to_itself_in_few_calls(num_segments):
    draw = random.Random(num_segments)
    segments = [Segment(5, ())]
    while len(segments) < num_segments:
        parent = draw.choice([(0,), (0,), *[(0, n) for n, segment in enumerate(segments) if segment.parents == (0,)]])
        segments.append(Segment(draw.randint(20, 24), parent))
    starts = list(itertools.accumulate([0] + [segment.length for segment in segments]))
    batches, output_places = batch_segments(segments)
    queries = torch.cat([batch.queries.flatten() for batch in batches])
    assert torch.equal(queries[output_places], torch.arange(starts[-1]))
    seen = [
        keys[row].tolist()
        for batch in batches
        for keys, mask in zip(batch.keys, batch.mask[:, 0], strict=True)
        for row in mask
    ]
    for number, segment in enumerate(segments):
        before = [place for parent in segment.parents for place in range(starts[parent], starts[parent + 1])]
        for token in range(starts[number], starts[number + 1]):
            assert seen[output_places[token]] == [*before, *range(starts[number], token + 1)]
    assert len(batches) <= 3  # the common beginning, and two depths
    assert sum(batch.mask.numel() for batch in batches) <= 1.5 * sum(
        segment.length * (segment.length + sum(segments[parent].length for parent in segment.parents))
        for segment in segments
    )


def test_attention_over_rows_takes_few_calls(make_reward_model, processor, family, prompts, images, monkeypatch):
    model = make_reward_model(family)
    batch = processor([*prompts[:1]] * 12, [image.copy() for image in images[:1] * 12])
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: calls.append(query) or attend(query, *args, **kwargs),
    )
    num_layers = len(model.backbone.language_model.layers)
    with torch.no_grad():
        model.backbone.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        num_vision = len(calls)
        model(**batch)
    assert len(calls) - 2 * num_vision == 2 * num_layers  # the instruction, and all rows


def gradients_of(model, batch):
    model.zero_grad()
    output = model(**batch)
    weights = torch.linspace(-1, 1, len(output.mean))
    (output.mean * weights + output.log_std * weights.flip(0)).sum().backward()
    values = torch.cat([output.mean, output.log_std]).detach()
    return values, {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_scores_and_gradients_are_those_of_rows_apart(
    make_reward_model, processor, family, rows, num_rows, checkpointing
):
    """Oracle: transformers' own attention over padded rows, each with its own image."""
    model = make_reward_model(family, head_dropout=0.0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prompts, images, _ = rows
    shared_batch = processor(prompts[:num_rows], images[:num_rows])
    own_batch = processor(prompts[:num_rows], [image.copy() for image in images[:num_rows]])
    config = model.backbone.language_model.config
    assert config._attn_implementation == SHARED_SDPA
    values, gradients = gradients_of(model, shared_batch)
    config._attn_implementation = "sdpa"
    for batch in (own_batch, shared_batch):
        expected_values, expected_gradients = gradients_of(model, batch)
        assert (values - expected_values).abs().max() < 1e-5
        assert gradients.keys() == expected_gradients.keys()
        scale = max(gradient.abs().max() for gradient in expected_gradients.values())
        for name, expected in expected_gradients.items():
            assert (gradients[name] - expected).abs().max() < 1e-5 * scale, name


def test_a_prompt_reads_no_other_prompt_of_its_image(make_reward_model, processor, family, prompts, images):
    model = make_reward_model(family)
    with torch.no_grad():
        scores = {
            pair: model(**processor([prompts[i] for i in pair], [images[0], images[0]])).mean[0].item()
            for pair in itertools.product([0], range(len(prompts)))
        }
        other = model(**processor([prompts[1]], [images[0]])).mean.item()
    assert max(scores.values()) - min(scores.values()) < 1e-5
    assert abs(scores[0, 0] - other) > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for_is_used(make_reward_model, processor, prompts, images, implementation):
    model = make_reward_model(attn_implementation=implementation)
    used = model.backbone.language_model.config._attn_implementation
    assert used == {"sdpa": SHARED_SDPA, "eager": "eager"}[implementation]
    # what is saved, and what a copy of the model is built from, names no attention of ours
    assert model.config.backbone_config.get_text_config()._attn_implementation == implementation
    assert SHARED_SDPA not in model.config.to_json_string()
