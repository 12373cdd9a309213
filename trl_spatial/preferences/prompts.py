"""Checks and cleans prompts, in the same way for every command and trainer."""

from typing import Any


MAX_PROMPT_CHARACTERS = 20_000  # tokenization takes quadratic time: a prompt of a megabyte would take hours


def clean_prompt(prompt: Any) -> str:
    """
    Checks a prompt and removes whitespace and byte order marks (U+FEFF) from its ends, so that a prompt has one score wherever
    it was read from.

    Raises:
        `ValueError`: If it is not a string, is empty, has more than `MAX_PROMPT_CHARACTERS` characters, or contains a
        lone surrogate, which is not a character. The message is a predicate ("is empty"), for the caller to name the row.
    """
    if not isinstance(prompt, str):
        raise ValueError("is missing" if prompt is None else f"is a {type(prompt).__name__}, not a string")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"has {len(prompt):,} characters; the limit is {MAX_PROMPT_CHARACTERS:,}, so shorten it")
    cleaned = prompt.strip().strip("\ufeff").strip()
    if not cleaned:
        raise ValueError("is empty")
    try:
        cleaned.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(cleaned[error.start])
        raise ValueError(
            f"contains half of a surrogate pair, U+{code:04X}, at character {error.start}; remove it, or decode the text "
            "as UTF-8 or UTF-16"
        ) from None
    return cleaned
