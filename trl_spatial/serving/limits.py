"""What requests may hold. Nothing here needs the extra `serve`: the command reads the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """
    What requests may hold.

    Args:
        max_images (`int`, *optional*, defaults to `64`):
            Images of a request.
        max_image_bytes (`int`, *optional*, defaults to 64 MiB):
            Bytes of an image file.
        max_bytes (`int`, *optional*, defaults to 128 MiB):
            Bytes of a request.
        max_pixels (`int`, *optional*, defaults to 48 × 2²⁰):
            Pixels of an image, by default as many as a scorer here takes. A small file can hold very many.
        max_prompt_length (`int`, *optional*, defaults to `20_000`):
            Characters of a prompt, by default as many as a scorer here takes.
        max_held_bytes (`int`, *optional*, defaults to 2 GiB):
            Bytes of all requests together, from the first byte of the body until the answer: bodies and decoded images.
    """

    max_images: int = 64
    max_image_bytes: int = 64 * 2**20
    max_bytes: int = 128 * 2**20
    max_pixels: int = 48 * 2**20
    max_prompt_length: int = 20_000
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
