"""What the families that read prompts by CLIP and T5 have in common."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_warnings_about_clip(pipeline: Any) -> Iterator[None]:
    """
    Leaves out the warnings of diffusers and transformers that CLIP sees only the first 77 tokens of a prompt. It is meant
    to see no more: T5 reads the rest.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline that encodes prompts within the context.
    """
    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, "transformers.tokenization_utils_base")]

    def is_about_something_else(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "CLIP can only handle" not in message and not message.startswith("Token indices sequence length")

    for logger in loggers:
        logger.addFilter(is_about_something_else)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_about_something_else)
