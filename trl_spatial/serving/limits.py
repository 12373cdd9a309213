"""Limits of requests. Imports nothing of the extra `serve`, because the command reads the defaults without it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of requests."""

    max_images: int = 64
    max_image_bytes: int = 64 * 2**20  # per image file
    max_bytes: int = 128 * 2**20
    # the limit of a local scorer; even a small file can hold very many pixels
    max_pixels: int = 48 * 2**20
    max_prompt_length: int = 20_000
    # bodies and decoded images of all requests together, from the first byte of a body until its answer
    max_held_bytes: int = 2**31

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.max_held_bytes < self.max_bytes:
            raise ValueError(
                f"`max_bytes` is {self.max_bytes} and `max_held_bytes` is {self.max_held_bytes}: the largest request would "
                "never fit. Raise `max_held_bytes` or lower `max_bytes`."
            )
