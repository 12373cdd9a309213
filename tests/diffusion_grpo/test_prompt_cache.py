"""The prompt cache: what it returns, how often it encodes, where the encoders are, how much it keeps."""

import warnings

import pytest
import torch

from tests.diffusion_grpo.families import shared_policy
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.policies.flux import FluxPolicy
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache


PROMPTS = ["a red circle left of a blue square", "a cat", "a lamp above the dog", "a cat"]
# float32 embeddings of one prompt: 16 tokens of 32 numbers and a pooled one
BYTES_PER_PROMPT = 4 * (16 * 32 + 32)


class UnpaddedPolicy(FluxPolicy):
    """Embeddings as long as the prompt, with a mask: the form of model families that do not pad to a fixed length."""

    def encode_prompt(self, prompts):
        embeds = super().encode_prompt(prompts)
        tokens = self.pipeline.tokenizer_2(prompts, padding=True, return_tensors="pt")
        length = tokens.input_ids.shape[1]
        return {"prompt_embeds": embeds["prompt_embeds"][:, :length], "mask": tokens.attention_mask.bool()}


def bitwise_equal(embeds, others):
    return embeds.keys() == others.keys() and all(torch.equal(embeds[name], others[name]) for name in embeds)


def test_rows_are_the_prompts_own_embeddings_in_their_order(flux_policy):
    embeds = PromptCache(flux_policy, "cpu").get(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = flux_policy.encode_prompt([prompt])
        assert bitwise_equal({name: rows[row : row + 1] for name, rows in embeds.items()}, alone)
    assert {name: tuple(rows.shape) for name, rows in embeds.items()} == {
        "prompt_embeds": (4, 16, 32),
        "pooled_prompt_embeds": (4, 32),
    }
    together = flux_policy.encode_prompt(PROMPTS)
    assert all(torch.allclose(embeds[name], together[name], atol=1e-5) for name in embeds)


def test_each_distinct_prompt_is_encoded_once(flux_policy):
    calls = []
    hook = flux_policy.pipeline.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    cache = PromptCache(flux_policy, "cpu")
    cache.get(PROMPTS)
    cache.get(PROMPTS[::-1])
    cache.get(["a dog", *PROMPTS])
    hook.remove()
    assert cache.num_encoded == len(calls) == 4


def test_embeddings_do_not_depend_on_what_was_asked_before(flux_policy):
    # a resumed run starts with an empty cache
    warm, cold = PromptCache(flux_policy, "cpu"), PromptCache(flux_policy, "cpu")
    for prompts in (["a dog", "a cat"], ["a table", PROMPTS[0], "a red dog"]):
        warm.get(prompts)
    assert bitwise_equal(warm.get(PROMPTS), cold.get(PROMPTS))


def test_a_returned_tensor_can_be_changed(flux_policy):
    cache = PromptCache(flux_policy, "cpu")
    before = cache.get(["a cat"])["prompt_embeds"].clone()
    cache.get(["a cat"])["prompt_embeds"].zero_()
    assert torch.equal(cache.get(["a cat"])["prompt_embeds"], before)


@pytest.fixture
def movements(make_flux_pipeline, monkeypatch):
    """A policy, and the list of where its encoders were moved to and when they ran."""
    policy, events = make_policy(make_flux_pipeline(), max_sequence_length=16), []
    for number, encoder in enumerate(policy.encoders):

        def move(device, number=number, encoder=encoder):
            events.append((number, device))
            return type(encoder).to(encoder, device)

        monkeypatch.setattr(encoder, "to", move)
        encoder.register_forward_pre_hook(lambda *_, number=number: events.append((number, "forward")))
    return policy, events


def test_encoders_are_on_the_device_only_while_they_encode(movements):
    policy, events = movements
    cpu, device = torch.device("cpu"), torch.device("cpu:0")  # two names of one device, told apart here
    cache = PromptCache(policy, device)
    assert events == [(0, cpu), (1, cpu)]
    events.clear()
    cache.get(PROMPTS[:2])
    forwards = [(0, "forward"), (1, "forward")]
    assert events == [(0, device), (1, device), *forwards, *forwards, (0, cpu), (1, cpu)]
    events.clear()
    cache.get(PROMPTS[:2])
    assert events == []


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_embeddings_are_on_the_accelerator_and_encoders_are_not(flux_policy):
    device = torch.accelerator.current_accelerator()
    embeds = PromptCache(flux_policy, device).get(PROMPTS)
    assert all(rows.device.type == device.type for rows in embeds.values())
    assert all(
        parameter.device.type == "cpu" for encoder in flux_policy.encoders for parameter in encoder.parameters()
    )


def test_encoders_leave_the_device_after_an_error_too(movements):
    policy, events = movements
    cache = PromptCache(policy, "cpu:0")
    policy.encoders[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.get(PROMPTS)
    assert events[-2:] == [(0, torch.device("cpu")), (1, torch.device("cpu"))]


def test_the_prompts_unused_for_longest_are_dropped_with_one_warning(flux_policy):
    cache = PromptCache(flux_policy, "cpu", max_bytes=2 * BYTES_PER_PROMPT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get(["one", "two"])
        cache.get(["one"])
    with pytest.warns(UserWarning, match=r"3 prompts take more than `max_bytes=4352`.*Raise") as record:
        cache.get(["three"])  # drops "two"
        assert cache.num_encoded == 3
        cache.get(["one", "three"])
        assert cache.num_encoded == 3
        cache.get(["two"])
        assert cache.num_encoded == 4
    assert len(record) == 1


def test_more_prompts_than_fit_are_still_returned(flux_policy):
    prompts = ["one", "two", "three", "four"]
    cache = PromptCache(flux_policy, "cpu", max_bytes=BYTES_PER_PROMPT)
    with pytest.warns(UserWarning, match="4 prompts"):
        embeds = cache.get(prompts)
    assert bitwise_equal(embeds, PromptCache(flux_policy, "cpu").get(prompts))
    for prompt, num_encoded in (("four", 4), ("three", 5), ("three", 5), ("four", 6)):  # one is kept
        cache.get([prompt])
        assert cache.num_encoded == num_encoded


# Prompts that are expected


def test_expected_prompts_are_encoded_together_with_the_first_one_that_is_missing(movements):
    policy, events = movements
    cache = PromptCache(policy, torch.device("cpu:0"))
    names = [f"prompt {number}" for number in range(12)]
    plain = PromptCache(policy, "cpu")
    events.clear()
    for start in range(0, 12, 2):
        cache.expect(iter(names[start:]))
        assert bitwise_equal(cache.get(names[start : start + 2]), plain.get(names[start : start + 2]))
    moves = [device for number, device in events if number == 0 and device == torch.device("cpu:0")]
    assert len(moves) == 1 and cache.num_encoded == 12


@pytest.mark.parametrize("policy_class", [FluxPolicy, UnpaddedPolicy])
def test_no_more_is_encoded_ahead_than_fits_and_nothing_of_it_is_dropped_before_it_is_used(
    make_flux_pipeline, policy_class, monkeypatch
):
    policy = policy_class(make_flux_pipeline(), max_sequence_length=16)
    max_bytes = 4 * BYTES_PER_PROMPT
    cache = PromptCache(policy, "cpu", negative_prompt="no", max_bytes=max_bytes)
    names = [" ".join(["prompt"] * (number % 5) + [f"{number}"]) for number in range(30)]
    moves = []
    monkeypatch.setattr(policy.encoders[0], "to", moves.append)
    cache.expect(names)
    plain = PromptCache(policy, "cpu", negative_prompt="no")
    moves.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            embeds = cache.get([name])
            num_moves = len(moves)
            assert bitwise_equal(embeds, plain.get([name]))
            del moves[num_moves:]
            assert sum(tensor.nbytes for row in cache._rows.values() for tensor in row.values()) <= max_bytes
    assert cache.num_encoded == plain.num_encoded == 31
    assert len(moves) <= 2 * 10  # three prompts fit beside the negative one, more if they are short


def test_what_was_expected_before_is_forgotten(flux_policy):
    cache = PromptCache(flux_policy, "cpu")
    cache.expect(["one", "two"])
    cache.expect(["three"])
    cache.get(["four"])
    cache.get(["three"])
    assert cache.num_encoded == 2


def test_rows_of_different_lengths_are_padded_with_zeros(make_flux_pipeline):
    policy = UnpaddedPolicy(make_flux_pipeline(), max_sequence_length=16)
    embeds = PromptCache(policy, "cpu").get(PROMPTS)
    lengths = [9, 3, 6, 3]  # a token per word and the end of the text
    assert embeds["prompt_embeds"].shape == (4, 9, 32)
    assert embeds["mask"].tolist() == [[True] * length + [False] * (9 - length) for length in lengths]
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        assert torch.equal(embeds["prompt_embeds"][row, :length], policy.encode_prompt([prompt])["prompt_embeds"][0])
        assert not embeds["prompt_embeds"][row, length:].any()


def test_embeddings_of_the_negative_prompt_are_beside_those_of_every_prompt():
    policy = shared_policy("qwen_image")
    cache = PromptCache(policy, "cpu", negative_prompt="a dog")
    embeds, plain = cache.get(PROMPTS), PromptCache(policy, "cpu").get(PROMPTS)
    assert cache.num_encoded == 4 and cache.get(PROMPTS[:1]).keys() == embeds.keys() and cache.num_encoded == 4
    assert bitwise_equal({name: embeds[name] for name in plain}, plain)
    expected = policy.encode_prompt(["a dog"])  # as long as it is, whatever the prompts are
    assert {name.removeprefix("negative_") for name in embeds.keys() - plain.keys()} == expected.keys()
    for name, row in expected.items():
        assert torch.equal(embeds[f"negative_{name}"], torch.cat([row] * 4))
