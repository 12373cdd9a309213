"""A tiny vision-language model of a real class, for tests of what asks one, and its forward pass written out."""

import shutil

import torch
from models import build_qwen2_5_vl, build_tokenizer
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["Yes No", " Yes No", "yes no", " yes no", "A", "B", " A B C D", "Is the mug to the left of the plate?"]


def save_vision_model(folder, backbone_folder):
    """A Qwen2.5-VL of random weights that knows the words Yes and No."""
    tokenizer = build_tokenizer(WORDS, 1000)
    model = build_qwen2_5_vl(
        tokenizer, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, vision_hidden_size=16,
        vision_window_size=32, vocab_size=512, initializer_range=0.2,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shutil.copy(backbone_folder / "preprocessor_config.json", folder)
    return folder


class ByHand:
    """The model by hand: the image's tokens are counted and written out, and the model runs once for each token."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def probabilities(self, image, text, answered=()):
        """Of every token to be the next after a question and some tokens of the answer: `(vocab_size,)`."""
        features = self.image_processor([image], return_tensors="pt")
        num_tokens = int(features["image_grid_thw"].prod()) // 4
        prompt = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * num_tokens}<|vision_end|>{text}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = torch.tensor([[*self.tokenizer(prompt)["input_ids"], *answered]])
        types = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
        return self.model(input_ids=ids, mm_token_type_ids=types, **features).logits[0, -1].softmax(-1)
