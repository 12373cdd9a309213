"""A prompt is read in one form, or refused in words."""

import pytest

from trl_spatial.preferences.prompts import MAX_PROMPT_CHARACTERS, clean_prompt


@pytest.mark.parametrize("before", ["", " ", "\ufeff", "\n\t", "\u2028\ufeff "])
@pytest.mark.parametrize("after", ["", "  ", "\r\n", "\x85"])
def test_blanks_at_the_ends_do_not_matter(before, after):
    inner = "a red  circle\nNA \U0001f600"
    assert clean_prompt(before + inner + after) == inner == clean_prompt(clean_prompt(inner))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "is missing"), (7, "is a int"), (["a"], "is a list"), ("", "is empty"), (" \ufeff\n", "is empty"),
        ("a \ud83d cup", r"U\+D83D, at character 2"), ("a" * (MAX_PROMPT_CHARACTERS + 1), "the limit is 20,000"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(prompt, words):
    with pytest.raises(ValueError, match=words):
        clean_prompt(prompt)
