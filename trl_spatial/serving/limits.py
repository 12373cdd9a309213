"""What requests may hold. Nothing here needs the extra `serve`: the command reads the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What requests may hold."""

    max_images: int = 64
    max_image_bytes: int = 64 * 2**20  # of an image file
    max_bytes: int = 128 * 2**20
    # as many as a scorer here takes; a small file can hold very many pixels
    max_pixels: int = 48 * 2**20
    max_prompt_length: int = 20_000
    # of all requests together, from the first byte of the body until the answer: bodies and decoded images
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
