"""The builders of the tiny models: a tokenizer of whole words, weights that depend on the seed alone."""

import re

import pytest
import torch
from models import _mrope_section, build_tokenizer


CORPUS = ["a red cube left of the blue sphere", "red crème cubes", "left, right"]


def test_every_word_of_the_corpus_is_one_token():
    tokenizer = build_tokenizer(CORPUS, 1000)
    assert [len(tokenizer.encode(text)) for text in CORPUS] == [8, 3, 3]
    assert len(tokenizer.encode("blue right sphere")) > 3  # "blue" was seen after a space only
    for text in (*CORPUS, "Ein grüner Würfel 🙂\n12 left"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_vocabulary_that_is_too_small_is_an_error_that_names_the_size():
    with pytest.raises(ValueError, match="got 10") as error:
        build_tokenizer(CORPUS, 10)
    needed = int(re.search(r"vocab_size >= (\d+)", str(error.value))[1])
    assert len(build_tokenizer(CORPUS, needed)) == needed
    with pytest.raises(ValueError):
        build_tokenizer(CORPUS, needed - 1)


def test_weights_depend_on_the_seed_alone(make_image_text_model, family):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = make_image_text_model(family, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    second, other = (make_image_text_model(family, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["model.language_model.layers.0.mlp.up_proj.weight"],
        other["model.language_model.layers.0.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize("head_dim", range(8, 132, 4))
def test_rotary_frequencies_are_shared_out(head_dim):
    time, row, column = _mrope_section(head_dim)
    assert time + row + column == head_dim // 2 and row == column and time > 0 and abs(row - head_dim * 3 / 16) < 1
    assert _mrope_section(128) == [16, 24, 24]  # as released
