"""What published programs said of tiny models (`recipes/bench/parity.py` made the files), and the parts to make these again."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPTokenizer

from recipes.bench.parity import byte_characters, make_image, make_weights


FOLDER = Path(__file__).parent / "parity"


class Published:
    """
    A file of results.

    Args:
        name (`str`):
            Its name, without `.json`.
    """

    def __init__(self, name):
        self.data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        self.prompts, self.scores = self.data["prompts"], self.data["scores"]
        self.images = [
            Image.fromarray(make_image(self.data["seed"] + number, size))
            for number, size in enumerate(self.data["images"])
        ]

    def weights(self):
        """Published name → weight, as a state dict."""
        weights = make_weights(self.data["shapes"], self.data["seed"])
        return {name: torch.from_numpy(array) for name, array in weights.items()}


def build_clip_tokenizer():
    """CLIP's tokenizer with the merges alone that the prompts need, numbered as in the whole."""
    data = json.loads((FOLDER / "hpsv2.json").read_text(encoding="utf-8"))
    letters = byte_characters()
    vocab = {token: number for number, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocab |= data["numbers"] | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in data["merges"]], model_max_length=77)
