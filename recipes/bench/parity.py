"""
Records what the published programs of other scorers compute for tiny random models, as JSON for the tests to compare ours with.

    python recipes/bench/parity.py --output tests/evaluation/scorers/parity

Run it in a separate environment without this package, whose dependencies are too new for the others:

    pip install "transformers==4.45.2" "trl==0.8.6" "peft==0.13.2" "accelerate==1.1.1" "datasets==3.1.0" "numpy<2" qwen-vl-utils
    pip install --no-deps hpsv2==1.2.0 hpsv3==1.0.0 image-reward==1.5 t2v-metrics==3.0 clip-anytorch
    pip install timm fairscale ftfy clint omegaconf matplotlib tensorboard pandas tyro torchvision

Their code runs unchanged. Both sides make weights, images and tokenizers with the functions in this file, so no weights need to be
stored. Where a package hard-codes a size, a smaller class is substituted.
"""

import argparse
import gzip
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


PROMPTS = ("a red mug to the left of two blue plates", "The cat sits behind a lamp, near the window!", "a dog")
IMAGE_SIZES = ((96, 64), (50, 81), (64, 64))
SEED = 20261125
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Made on both sides


def make_image(seed: int, size: Sequence[int]) -> np.ndarray:
    """Noise on a horizontal gradient: pixels `(height, width, 3)`, uint8."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None]
    return (noise + slope).astype(np.uint8)


def make_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """
    Makes random float32 weights, each from its own seed: matrices scaled to keep the magnitude of their inputs, standard normal
    embeddings, factors about 1 and offsets about 0.

    Args:
        shapes (`Mapping[str, Sequence[int]]`):
            Name → shape.
        seed (`int`):
            Combined with each name into that weight's seed.
    """
    weights = {}
    for name, shape in shapes.items():
        draws = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        if len(shape) < 2:
            draws = draws * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif "embed" not in name:
            draws = draws * (1.4 / np.sqrt(np.prod(shape[1:])))
        weights[name] = np.asarray(draws, np.float32)
    return weights


def save_qwen2_vl(folder: Path, *, hidden_size: int = 32, num_layers: int = 2) -> None:
    """Writes the configuration, tokenizer and image processor of a tiny Qwen2-VL, in the format of the released ones."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: number for number, character in enumerate(byte_characters())}
    merges = ["Y e", "Ye s", "N o"]
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    specials = {token: len(vocabulary) + number for number, token in enumerate(SPECIAL_TOKENS)}
    added = {str(number): {"content": token, "special": True} for token, number in specials.items()}
    _write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768, "eos_token": "<|im_end|>", "bos_token": None,
            "unk_token": None, "pad_token": "<|endoftext|>", "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE,
        },
    )  # fmt: skip
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "min_pixels": 3136,
            "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )  # fmt: skip
    _write(
        folder / "config.json",
        {
            "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu",
            "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": num_layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "rope_theta": 1000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "float32",
            "bos_token_id": specials["<|endoftext|>"], "eos_token_id": specials["<|im_end|>"],
            "image_token_id": specials["<|image_pad|>"], "video_token_id": specials["<|video_pad|>"],
            "vision_start_token_id": specials["<|vision_start|>"], "vision_end_token_id": specials["<|vision_end|>"],
            "vision_config": {
                "model_type": "qwen2_vl", "depth": 2, "embed_dim": 16, "hidden_size": hidden_size, "num_heads": 2,
                "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3,
            },
        },
    )  # fmt: skip


def byte_characters() -> list[str]:
    """The characters that byte-level tokenizers use for the 256 bytes, printable ones first."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte) for byte in printed] + [chr(256 + number) for number in range(len(others))]


def save_words(file: Path) -> None:
    """Writes a BERT vocabulary of words from the prompts and of letters."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(PROMPTS).lower())))
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words[3:] + letters)]
    file.write_text("\n".join([*tokens, *("##" + letter for letter in letters)]) + "\n", encoding="utf-8")


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data), encoding="utf-8")


# Results of the published programs


def pictures(sizes: Iterable[Sequence[int]]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(make_image(SEED + number, size)) for number, size in enumerate(sizes)]


def set_weights(model: Any, without: Sequence[str] = ()) -> dict[str, list[int]]:
    """Sets a model's weights, except those whose names start with one of `without`. Returns the shapes of those it set."""
    import torch

    shapes = {
        name: list(tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(tuple(without))
    }
    weights = {name: torch.from_numpy(array) for name, array in make_weights(shapes, SEED).items()}
    model.load_state_dict(weights, strict=False)
    return shapes


def run_hpsv2(folder: Path) -> dict[str, Any]:
    """Runs `hpsv2.score` with a small CLIP in place of ViT-H-14."""
    import clip
    import hpsv2 as package
    import torch

    # the package lacks its tokenizer file, which is CLIP's
    merges_file = Path(clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    place = Path(package.__file__).parent / "src" / "open_clip" / merges_file.name
    if not place.exists():
        shutil.copy(merges_file, place)
    from hpsv2 import img_score
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import tokenize
    from hpsv2.src.open_clip.transform import image_transform

    sizes = {"side": 56, "patch": 14, "vision": 48, "text": 32, "layers": 2, "head": 16, "joint": 24}
    model = CLIP(
        sizes["joint"],
        {"image_size": 56, "layers": 2, "width": 48, "head_width": 16, "patch_size": 14},
        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        output_dict=True,
    )
    shapes = set_weights(model)
    img_score.model_dict |= {"model": model, "preprocess_val": image_transform(56, is_train=False)}
    checkpoint = folder / "hpsv2.pt"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    scores = [
        float(img_score.score(image, prompt, cp=str(checkpoint))[0])
        for prompt, image in zip(PROMPTS, pictures(IMAGE_SIZES), strict=True)
    ]
    words = {f"{word}</w>" for prompt in PROMPTS for word in re.findall(r"[a-z]+|[^\sa-z]+", prompt.lower())}
    merges = gzip.decompress(merges_file.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    used = [merge for merge in merges if any(merge.replace(" ", "") in word for word in words)]
    numbers = {merge.replace(" ", ""): 512 + merges.index(merge) for merge in used}
    tokens = [[int(token) for token in row if token] for row in tokenize(list(PROMPTS))]
    return {"sizes": sizes, "shapes": shapes, "merges": used, "numbers": numbers, "tokens": tokens, "scores": scores}


def run_image_reward(folder: Path) -> dict[str, Any]:
    """Runs `ImageReward.score` with a small vision transformer and a small text encoder."""
    import contextlib

    module: Any = import_module("ImageReward.ImageReward")
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    (folder / "bert-base-uncased").mkdir()
    save_words(folder / "bert-base-uncased" / "vocab.txt")
    text = {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "add_cross_attention": True, "encoder_width": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    _write(folder / "med_config.json", text)

    def small_vision_transformer(vit: str, image_size: int, *args: Any) -> tuple[Any, int]:
        return VisionTransformer(img_size=image_size, patch_size=32, embed_dim=24, depth=2, num_heads=2), 24

    blip_pretrain.create_vit = small_vision_transformer
    module.MLP = lambda size, MLP=module.MLP: MLP(text["hidden_size"])
    with contextlib.chdir(folder):  # where the tokenizer is found by name
        model = module.ImageReward(str(folder / "med_config.json"))
    shapes = set_weights(model)
    model.eval()
    scores = [model.score(prompt, image) for prompt, image in zip(PROMPTS, pictures(IMAGE_SIZES), strict=True)]
    return {"text": text, "vision": {"patch": 32, "width": 24}, "shapes": shapes, "scores": scores}


def run_hpsv3(folder: Path) -> dict[str, Any]:
    """Runs `HPSv3RewardInferencer.reward` with a small Qwen2-VL."""
    import hpsv3
    import safetensors.torch
    import torch
    import yaml
    from hpsv3.inference import HPSv3RewardInferencer
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
    from transformers import Qwen2VLConfig

    save_qwen2_vl(folder / "qwen")
    settings = yaml.safe_load((Path(hpsv3.__file__).parent / "config" / "HPSv3_7B.yaml").read_text())
    settings |= {
        "model_name_or_path": str(folder / "qwen"), "torch_dtype": "float32", "bf16": False, "output_dir": str(folder),
        "report_to": "none",
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    backbone = Qwen2VLRewardModelBT(
        Qwen2VLConfig.from_pretrained(folder / "qwen"), output_dim=2, rm_head_type="ranknet"
    )
    set_weights(backbone)
    backbone.save_pretrained(folder / "qwen")
    model = Qwen2VLRewardModelBT.from_pretrained(folder / "qwen", output_dim=2, rm_head_type="ranknet")
    model.resize_token_embeddings(267)  # 256 bytes, 3 merges, 7 special tokens, and the reward token
    shapes = set_weights(model)
    safetensors.torch.save_file(model.state_dict(), folder / "HPSv3.safetensors")
    scorer = HPSv3RewardInferencer(str(folder / "small.yaml"), str(folder / "HPSv3.safetensors"), device="cpu")
    images = pictures(IMAGE_SIZES)
    with torch.no_grad():
        together = scorer.reward(images, list(PROMPTS)).tolist()
        alone = [scorer.reward([image], [prompt])[0].tolist() for image, prompt in zip(images, PROMPTS, strict=True)]
    batch = scorer.prepare_batch(images[:1], list(PROMPTS[:1]))
    return {
        "shapes": shapes, "scores": alone, "scores_together": together, "num_tokens": batch["input_ids"].shape[1],
        "grid": batch["image_grid_thw"][0].tolist(),
    }  # fmt: skip


def run_vqascore(folder: Path) -> dict[str, Any]:
    """Runs `Qwen2VLModel.forward` of t2v_metrics with a small Qwen2-VL."""
    import torch
    import transformers
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    # imported along with Qwen2-VL, but too new for the transformers version that hpsv3 needs
    transformers.Qwen2_5_VLForConditionalGeneration = None
    videos: Any = ModuleType("decord")
    videos.VideoReader = videos.cpu = None
    videos.__spec__ = ModuleSpec("decord", None)  # other packages look for it
    sys.modules.setdefault("decord", videos)
    published = import_module("t2v_metrics.models.vqascore_models.qwen2vl_model")
    save_qwen2_vl(folder / "qwen")
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder / "qwen"))
    shapes = set_weights(model)
    model.save_pretrained(folder / "qwen")
    published.QWEN2_VL_MODELS["qwen2-vl-2b"] = {
        "tokenizer": {"path": str(folder / "qwen")},
        "model": {"path": str(folder / "qwen"), "torch_dtype": torch.float32, "attn_implementation": "sdpa"},
    }
    scorer = published.Qwen2VLModel("qwen2-vl-2b", device="cpu")
    files = [str(folder / f"{number}.png") for number in range(len(PROMPTS))]
    for file, image in zip(files, pictures(IMAGE_SIZES), strict=True):
        image.save(file)
    question = 'Does this figure show "{}"? Please answer Yes or No.'
    scores = scorer.forward(files, list(PROMPTS), question_template=question).tolist()
    return {"transformers": transformers.__version__, "shapes": shapes, "question": question, "scores": scores}


def stand_in_for_what_is_not_needed() -> None:
    """Stands in for torchvision's operators, whose wheels may not match torch's, and for packages that import every model."""
    import sysconfig

    import torch

    source = Path(sysconfig.get_paths()["purelib"], "torchvision", "_meta_registrations.py").read_text()
    names = set(re.findall(r'register_meta\("(\w+)"\)', source)) | set(re.findall(r'"torchvision::(\w+)"', source))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    stand_in_for_what_is_not_needed.library = library  # type: ignore[attr-defined]  # keeps it alive
    place = Path(sysconfig.get_paths()["purelib"])
    for name in ("t2v_metrics", "t2v_metrics.models", "t2v_metrics.models.vqascore_models"):
        package: Any = ModuleType(name)
        package.__path__ = [str(place / name.replace(".", "/"))]
        sys.modules[name] = package


PROGRAMS = {
    "hpsv2": ("hpsv2", run_hpsv2),
    "image_reward": ("image-reward", run_image_reward),
    "hpsv3": ("hpsv3", run_hpsv3),
    "vqascore": ("t2v-metrics", run_vqascore),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the JSON files.")
    parser.add_argument(
        "--only", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS), help="Some of the programs."
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    stand_in_for_what_is_not_needed()
    for name in args.only:
        package, run = PROGRAMS[name]
        with tempfile.TemporaryDirectory() as folder:
            result = run(Path(folder))
        header = {
            "package": package,
            "version": version(package),
            "seed": SEED,
            "prompts": PROMPTS,
            "images": IMAGE_SIZES,
        }
        text = json.dumps(header | result, indent=1)
        text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
        (args.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, result["scores"], flush=True)


if __name__ == "__main__":
    main()
