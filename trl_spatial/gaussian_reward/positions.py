"""Positions of the tokens of rows with one image each, for all rows at once."""

import torch


def image_text_positions(
    attention_mask: torch.Tensor, mm_token_type_ids: torch.Tensor, image_grid_thw: torch.Tensor, merge_size: int
) -> torch.Tensor:
    """
    Numbers tokens on the three axes of Qwen-VL (time, row, column), as transformers does row by row in Python: words along the
    diagonal, tokens of an image on a plane, and the words after it from beyond its longer side.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            1 for tokens, 0 for padding.
        mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            1 at image tokens, 0 elsewhere.
        image_grid_thw (`torch.LongTensor` of shape `(batch_size, 3)`):
            Frames, rows and columns of patches of each row's image.
        merge_size (`int`):
            `merge_size` × `merge_size` patches become one image token.

    Returns:
        `torch.LongTensor` of shape `(3, batch_size, sequence_length)`, 0 at padding.
    """
    is_token = attention_mask == 1
    is_image = is_token & (mm_token_type_ids == 1)
    num_rows, num_columns = (image_grid_thw[:, 1:] // merge_size).unsqueeze(-1).unbind(1)  # each (batch_size, 1)
    num_words = (is_token & ~is_image).cumsum(-1)  # so far
    number = is_image.cumsum(-1) - 1  # index of an image token in its image
    word = num_words - 1 + torch.where(number >= 0, num_rows.maximum(num_columns), 0)
    frame, in_frame = number // (num_rows * num_columns), number % (num_rows * num_columns)
    place = torch.stack([frame, in_frame // num_columns, in_frame % num_columns])
    return torch.where(is_image, num_words + place, word) * is_token
