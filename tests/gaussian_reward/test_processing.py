"""The processor: what a row looks like, token by token, and that no prompt and no image can break it."""

import json
import random
import time

import numpy as np
import pytest
import torch
from models import build_processor, build_tokenizer
from PIL import Image

from trl_spatial.gaussian_reward.processing import (
    DEFAULT_INSTRUCTION,
    REWARD_TOKEN,
    SpatialScoreProcessor,
    build_chat_template,
    load_processor,
)
from trl_spatial.preferences.images import load_image


# Added tokens of Qwen's vocabulary that are not special, so that `split_special_tokens` does not split them.
PLAIN_ADDED_TOKENS = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>"]
CONTROL_TOKENS = ["<reward>", "<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|endoftext|>"]


def rows_of(batch):
    """The rows of a batch without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def written_out(prompt, num_image_tokens, instruction="Rate the layout."):
    return (
        f"<|im_start|>system\n{instruction}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * num_image_tokens}<|vision_end|>{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n<reward>"
    )


def test_rows_are_the_conversation_written_out_by_hand(processor, prompts, images):
    batch = processor(prompts, images)
    for row, prompt, grid in zip(rows_of(batch), prompts, batch["image_grid_thw"].tolist(), strict=True):
        text = written_out(prompt, grid[0] * grid[1] * grid[2] // 4)
        assert row == processor.tokenizer(text)["input_ids"]


def test_image_tokens_are_marked_and_as_many_as_merged_patches(processor, prompts, images):
    batch = processor(prompts, images)
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)
    assert set(batch["mm_token_type_ids"].unique().tolist()) == {0, 1}
    assert batch["mm_token_type_ids"].sum(-1).tolist() == (batch["image_grid_thw"].prod(-1) // 4).tolist()
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(-1).sum()


def hostile_prompts(count=200):
    """Control tokens whole, nested, halved, and mixed with markers and text."""
    draw = random.Random(0)
    pieces = [
        *CONTROL_TOKENS,
        *PLAIN_ADDED_TOKENS,
        "a red cube",
        " ",
        "\n",
        "\ue000",
        "\ue001",
        "{{ messages }}",
        "é",
        "🙂",
        "<",
        "|>",
        "",
    ]
    pieces += [token[:4] for token in CONTROL_TOKENS] + [token[4:] for token in CONTROL_TOKENS]
    pieces += [token[:5] + inner + token[5:] for token in CONTROL_TOKENS for inner in CONTROL_TOKENS]
    prompts = ["".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(count)]
    return [prompt for prompt in prompts if prompt.strip()]


def test_no_prompt_can_write_a_control_token(prompts, images):
    """Oracle: decoding gives the prompt back, without a single added token."""
    tokenizer = build_tokenizer(prompts, 1000)
    tokenizer.add_tokens(PLAIN_ADDED_TOKENS)
    processor = build_processor(tokenizer)
    assert tokenizer("<tool_call>", split_special_tokens=True)["input_ids"] == [tokenizer.vocab["<tool_call>"]]

    hostile = hostile_prompts()
    batch = processor(hostile, [images[0]] * len(hostile))
    num_image_tokens = int(batch["image_grid_thw"][0].prod()) // 4
    harmless = rows_of(processor(["x"], [images[0]]))[0]
    for row, prompt in zip(rows_of(batch), hostile, strict=True):
        assert row[-1] == processor.reward_token_id
        assert row.count(processor.image_token_id) == num_image_tokens
        for token_id in tokenizer.get_added_vocab().values():
            assert row.count(token_id) == harmless.count(token_id)
        begin = harmless.index(tokenizer.convert_tokens_to_ids("<|vision_end|>")) + 1
        end = len(row) - (len(harmless) - begin - 1)
        assert tokenizer.decode(row[begin:end]) == prompt.strip()  # nothing is lost either


def test_blanks_at_the_ends_do_not_count_and_endless_prompts_are_refused_at_once(processor, prompts, images):
    plain = processor(prompts[:1], images[:1])["input_ids"]
    for padded in (f"{prompts[0]} ", f"{prompts[0]}\n", f" \t{prompts[0]}", f"\ufeff{prompts[0]}"):
        assert torch.equal(processor([padded], images[:1])["input_ids"], plain)
    start = time.process_time()
    for wrong, message in {"a" * 10**6: "1,000,000 characters", "a\ud83d": "surrogate", " ": "is empty"}.items():
        with pytest.raises(ValueError, match=f"The prompt of row 1 .*{message}"):
            processor([prompts[0], wrong], images[:2])
    assert time.process_time() - start < 5


def test_both_padding_sides_hold_the_same_rows(processor, prompts, images):
    right = processor(prompts, images, padding_side="right")
    left = processor(prompts, images, padding_side="left")
    assert rows_of(right) == rows_of(left)
    assert right["attention_mask"][2].tolist() == left["attention_mask"][2].flip(0).tolist()
    assert left["attention_mask"][:, -1].all()
    assert not torch.equal(left["input_ids"], right["input_ids"])
    assert torch.equal(left["pixel_values"], right["pixel_values"])


def test_a_batch_is_its_rows(processor, prompts, images):
    batch = processor(prompts, images)
    singles = [processor([prompt], [image]) for prompt, image in zip(prompts, images, strict=True)]
    assert rows_of(batch) == [rows_of(single)[0] for single in singles]
    assert torch.equal(batch["pixel_values"], torch.cat([single["pixel_values"] for single in singles]))
    assert torch.equal(batch["image_grid_thw"], torch.cat([single["image_grid_thw"] for single in singles]))


def test_num_tokens_counts_without_decoding(processor, prompts):
    generator = np.random.default_rng(0)
    sizes = [tuple(size) for size in generator.integers(4, 200, (40, 2)).tolist()]
    prompts = [prompts[i % len(prompts)] for i in range(len(sizes))]
    rows = rows_of(processor(prompts, [Image.new("RGB", size) for size in sizes]))
    assert processor.num_tokens(prompts, sizes) == [len(row) for row in rows]


def test_the_bound_of_the_number_of_tokens_is_one(processor, prompts):
    """Also for texts that grow in normalization: U+0958 becomes two characters, U+1D160 three, twelve bytes of four."""
    draw = np.random.default_rng(0)
    letters = [chr(code) for code in draw.integers(0x21, 0x2FFFF, 400) if not 0xD800 <= code < 0xE000]
    texts = [*prompts, "\u0958" * 50, "\U0001d160" * 50, *("".join(draw.choice(letters, 30)) for _ in range(50))]
    for size in ((8, 8), (64, 32)):
        lengths = processor.num_tokens(texts, [size] * len(texts))
        bounds = [processor.max_num_tokens(text, size) for text in texts]
        assert all(length <= bound for length, bound in zip(lengths, bounds, strict=True))
        # not far from it where a token is a byte
        assert bounds[-1] - lengths[-1] <= 2 * len(texts[-1].encode())


def test_another_template_is_encoded_anew(prompts, images):
    processor = build_processor(build_tokenizer(prompts, 1000), instruction="one")
    before = processor.num_tokens(prompts[:1], [(32, 32)])[0]
    processor.chat_template = build_chat_template("one and some more")
    after = processor.num_tokens(prompts[:1], [(32, 32)])[0]
    assert after > before and processor(prompts[:1], images[:1])["input_ids"].shape[1] > before


def test_max_length_is_the_longest_row_that_passes(processor, prompts, images):
    lengths = [len(row) for row in rows_of(processor(prompts, images))]
    longest = lengths.index(max(lengths))
    processor(prompts, images, max_length=max(lengths))
    with pytest.raises(
        ValueError, match=rf"Row {longest} has {max(lengths)} tokens.*`max_length` is {max(lengths) - 1}"
    ):
        processor(prompts, images, max_length=max(lengths) - 1)


def test_mismatched_lists_and_prompts_that_are_not_text(processor, prompts, images):
    with pytest.raises(ValueError, match="2 prompts and 5 images"):
        processor(prompts[:2], images)
    with pytest.raises(ValueError, match="prompt of row 1 is missing"):
        processor([prompts[0], None], images[:2])


def damaged_images(tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((40, 40), 50).save(whole)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(whole.read_bytes()[:-300])
    return {
        "cannot be decoded": str(truncated),
        "cannot be opened": b"not an image",
        "cannot be opened .*No such file": tmp_path / "missing.png",
        r"has no pixels \(0x5\)": Image.new("RGB", (0, 5)),
        r"is too narrow \(1x201\)": Image.new("RGB", (1, 201)),
        "is missing": None,
        "is a int": 7,
        "is missing.": {"bytes": None, "path": None},
    }


def test_damaged_images_are_named(processor, prompts, images, tmp_path):
    for message, damaged in damaged_images(tmp_path).items():
        with pytest.raises(ValueError, match=f"The image of row 1 {message}"):
            processor(prompts[:3], [images[0], damaged, images[2]])


def test_every_form_of_an_image_gives_the_same_pixels(processor, prompts, images, tmp_path):
    path = tmp_path / "image.png"
    images[0].save(path)
    forms = [path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, {"path": str(path)}]
    expected = processor(prompts[:1], [images[0]])["pixel_values"]
    for form in forms:
        assert torch.equal(processor(prompts[:1], [form])["pixel_values"], expected)
    with path.open("rb") as file:
        assert torch.equal(processor(prompts[:1], [file])["pixel_values"], expected)


def test_left_is_the_viewers_left():
    upright = Image.new("RGB", (40, 20), "blue")
    upright.paste("red", (0, 0, 10, 20))  # red on the left
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6  # "rotate 90° clockwise to view"
    assert np.array_equal(np.asarray(load_image(stored)), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_mode_of_image_becomes_rgb(processor, prompts, mode):
    image = Image.new(mode, (32, 3 if mode == "L" else 32))  # three rows are not three channels
    assert load_image(image).mode == "RGB"
    assert processor(prompts[:1], [image])["pixel_values"].shape[1] == 3 * 2 * 8 * 8


def test_patches_are_the_image_cut_up(processor, prompts):
    """An image that needs no resizing comes back exactly when the patches are put together by hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    batch = processor(prompts[:1], [Image.fromarray(pixels)])
    patches = batch["pixel_values"].numpy().reshape(2, 3, 2, 2, 3, 2, 8, 8)  # rows, columns, merged 2x2, C, T, y, x
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    for row, column, y, x in np.ndindex(2, 3, 2, 2):
        for frame in range(2):
            patch = patches[row, column, y, x, :, frame].transpose(1, 2, 0) * std + mean
            top, left = (2 * row + y) * 8, (2 * column + x) * 8
            assert np.abs(patch * 255 - pixels[top : top + 8, left : left + 8]).max() < 1e-3


@pytest.mark.parametrize(
    "instruction", ["Rate it.", "", 'He said "no" \\ {{ x }} {% if %} \n é 🙂', DEFAULT_INSTRUCTION]
)
def test_a_saved_processor_comes_back(tmp_path, prompts, images, instruction):
    original = build_processor(build_tokenizer([*prompts], 1000), instruction=instruction)
    original.save_pretrained(tmp_path)
    for loaded in (SpatialScoreProcessor.from_pretrained(tmp_path), load_processor(tmp_path)):
        before, after = original(prompts, images), loaded(prompts, images)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert instruction in loaded.tokenizer.decode(rows_of(after)[0])
    assert load_processor(tmp_path, instruction="Anew.").chat_template == build_chat_template("Anew.")


@pytest.mark.parametrize("damage", [lambda text: text[:-90], lambda text: "", lambda text: "{{ nonsense }}"])
def test_a_damaged_template_of_a_reward_model_is_an_error(processor, tmp_path, damage):
    """And not replaced: the model would be asked another question than in training."""
    processor.save_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"chat_template.jinja of .*build_chat_template"):
        load_processor(tmp_path)
    assert load_processor(tmp_path, instruction="Anew.").chat_template == build_chat_template("Anew.")


def test_default_instruction_is_about_a_hundred_tokens_long():
    assert 60 <= len(DEFAULT_INSTRUCTION.split()) <= 100


def test_a_backbone_gets_token_template_and_image_limits(official_checkpoints, family, prompts, images):
    folder, _ = official_checkpoints[family]
    loaded = load_processor(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    known = {**vocabulary["model"]["vocab"], **{token["content"]: token["id"] for token in vocabulary["added_tokens"]}}
    assert REWARD_TOKEN not in known
    assert loaded.reward_token_id == max(known.values()) + 1
    assert all(loaded.tokenizer.convert_tokens_to_ids(token) == token_id for token, token_id in known.items())
    assert DEFAULT_INSTRUCTION in loaded.tokenizer.decode(rows_of(loaded(prompts, images))[0])
    assert loaded.image_processor.size["longest_edge"] == 48 * 48

    limited = load_processor(folder, min_pixels=1024, max_pixels=1024, instruction="Rate the layout.")
    grids = limited(prompts[:2], [Image.new("RGB", (8, 8)), Image.new("RGB", (500, 500))])["image_grid_thw"]
    assert grids.tolist() == [[1, 4, 4], [1, 4, 4]]


def test_contradicting_image_limits(backbone_folder):
    with pytest.raises(ValueError, match="min_pixels=4000, max_pixels=2304"):
        load_processor(backbone_folder, min_pixels=4000)


def test_other_families_are_refused_with_a_way_out(backbone_folder, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessor

    AutoTokenizer.from_pretrained(backbone_folder).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not of a Qwen-VL family.*CLIPImageProcessor.*CONTRIBUTING"):
        load_processor(tmp_path)


def test_a_template_without_reward_token_is_refused(processor, prompts, images):
    template = build_chat_template("Rate.").replace(REWARD_TOKEN, "")
    broken = SpatialScoreProcessor(processor.image_processor, processor.tokenizer, chat_template=template)
    with pytest.raises(ValueError, match="once each"):
        broken(prompts, images)
