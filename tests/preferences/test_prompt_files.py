"""Prompts of files of many lines."""

import tracemalloc

import pytest
from datasets import Dataset

from trl_spatial.preferences.prompt_files import clean_prompts, read_lines


NUM_LINES = 25_000  # several batches


def test_lines_are_those_of_the_file(tmp_path):
    lines = [f"prompt {number} of a line" if number % 7 else "" for number in range(NUM_LINES)]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "prompts.txt").write_text("\ufeff" + end.join(lines), encoding="utf-8", newline="")
        assert read_lines(tmp_path / "prompts.txt")["train"]["prompt"][:] == [line for line in lines if line]


def test_memory_does_not_hold_the_lines_twice(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"{number:06d} " + "x" * 200 for number in range(2 * NUM_LINES)))
    read_lines(file)  # what is imported on the way
    tracemalloc.start()
    clean_prompts(read_lines(file)["train"], "prompts.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.8 * file.stat().st_size  # of batches; Arrow holds the text once, which is not traced


def test_cleaned_rows_keep_their_other_columns():
    texts = ["a red circle"] * NUM_LINES + [" a blue square\ufeff"]
    prompts = Dataset.from_dict({"level": list(range(len(texts))), "prompt": texts})
    cleaned = clean_prompts(prompts, "prompts")
    assert cleaned.column_names == ["level", "prompt"]
    assert cleaned["level"][:] == prompts["level"][:]
    assert cleaned["prompt"][:] == [*texts[:-1], "a blue square"]


def test_a_bad_row_of_a_later_batch_is_named(tmp_path):
    prompts = Dataset.from_dict({"prompt": ["a red circle"] * NUM_LINES + [None]})
    with pytest.raises(ValueError, match=f"prompts, row {NUM_LINES}, column `prompt`: None is missing"):
        clean_prompts(prompts, "prompts")
    (tmp_path / "prompts.txt").write_bytes(b"a red circle\n" * NUM_LINES + b"\xff\n")
    with pytest.raises(ValueError, match=f"line {NUM_LINES + 1} is not UTF-8"):
        read_lines(tmp_path / "prompts.txt")
