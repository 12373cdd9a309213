"""Tiny models of the real classes, saved as the official checkpoints are, and images to score. Nothing is downloaded."""

import gc
import json
import os


# What a test or a command would set for a program is here where it may be: the variables are then the same for more programs,
# which share the process of tests/warm.py.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    # the clients would ask again after 10 seconds, in which a busy machine may not get to answer
    HF_HUB_ETAG_TIMEOUT="600",
    HF_HUB_DOWNLOAD_TIMEOUT="600",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import pytest


# What takes seconds to import is imported where it is used: the process that hands out the tests uses none of it.
INSTRUCTION = "Rate the layout."
PROMPTS = [
    "a red cube to the left of a blue sphere",
    "the cat sits on top of the wooden table, behind the lamp, and to the right of the window",
    "a blue cube",
    "a lamp behind the red sphere",
    "the window to the left of the cat",
]
IMAGE_SIZES = [(32, 48), (48, 48), (64, 32), (32, 32), (17, 90)]
SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, vision_hidden_size=16, patch_size=8)
# Prefixes of the weights in the official checkpoints on the Hub, and what transformers calls them.
OFFICIAL_NAMES = {
    "qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
    "qwen3_vl": {},
}


# Two processes share the files: the longest come first, so that neither is left with one at the end.
LONGEST = (
    "tests/test_readme.py", "tests/hub/test_publishing.py", "tests/demo/test_demo.py", "tests/hub/test_failures.py",
    "tests/hub/test_round_trip.py", "tests/diffusion_grpo/test_processes.py", "tests/gaussian_reward/test_trainer.py",
    "tests/test_ablations.py", "tests/test_bench_gpu.py", "tests/true_size/test_generators.py", "tests/test_cli.py",
    "tests/test_recipes.py", "tests/training/test_base.py", "tests/training/test_machines.py",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The collector, which would find nothing, takes a third of the time in which the libraries are imported."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries():
    """One thread, no progress bars, and no waiting for the disk."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    os.fsync = lambda file: None  # no power is cut in a test


@pytest.fixture(scope="module", autouse=True)
def quick_collector(quiet_libraries):
    """Every training collects garbage. What was there before a file, a million objects, is not looked through each time."""
    gc.collect()
    gc.freeze()


def _tokenizer():
    from models import build_tokenizer

    return build_tokenizer([*PROMPTS, INSTRUCTION], 1000)


def _image_text_model(family, **kwargs):
    import models

    # One windowed and one full block in the vision tower, grouped queries, spare rows in the embedding, weights large
    # enough for the output to depend on the input.
    sizes = SIZES | {"num_key_value_heads": 1, "vocab_size": 512, "initializer_range": 0.2}
    if family == "qwen2_5_vl":
        sizes["vision_window_size"] = 32
    return getattr(models, f"build_{family}")(_tokenizer(), **(sizes | kwargs))


@pytest.fixture(params=list(OFFICIAL_NAMES))
def family(request):
    """Each model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_image_text_model():
    """A function that builds a tiny image-text model of a family, with random weights."""
    return _image_text_model


@pytest.fixture(scope="session")
def processor():
    """The processor of the tiny reward models. Treat it as read-only."""
    from models import build_processor

    return build_processor(_tokenizer(), max_pixels=48 * 48, instruction=INSTRUCTION)


@pytest.fixture(scope="session")
def prompts():
    """Captions of different lengths."""
    return list(PROMPTS)


@pytest.fixture(scope="session")
def images():
    """Random images of different shapes, as many as prompts."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in IMAGE_SIZES
    ]


def _write_official_checkpoint(folder, family):
    """Saves a tiny backbone under the file names, keys and config fields of the official Hub repositories."""
    from safetensors.torch import save_file

    model = _image_text_model(family)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for prefix, official in OFFICIAL_NAMES[family].items():
            if name.startswith(prefix):
                name = official + name.removeprefix(prefix)
                break
        tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 256,
        "max_pixels": 48 * 48,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tensors


@pytest.fixture(scope="session")
def official_checkpoints(tmp_path_factory):
    """Family → (folder of an official-looking tiny backbone, the tensors in it). Treat the folders as read-only."""
    checkpoints = {}
    for family in OFFICIAL_NAMES:
        folder = tmp_path_factory.mktemp(family)
        checkpoints[family] = (folder, _write_official_checkpoint(folder, family))
    return checkpoints


@pytest.fixture(scope="session")
def backbone_folder(official_checkpoints):
    """Folder of a tiny Qwen2.5-VL backbone with tokenizer and image processor. Treat it as read-only."""
    return official_checkpoints["qwen2_5_vl"][0]


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """Folder of a tiny `FluxPipeline`, as saved by diffusers. Treat it as read-only."""
    from flux import build_flux_pipeline  # diffusers takes seconds to import: not for tests without it

    folder = tmp_path_factory.mktemp("flux")
    build_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def make_reward_model(official_checkpoints, processor):
    """A function that builds a tiny reward model, in evaluation mode, from a family's official-looking checkpoint."""
    from trl_spatial.gaussian_reward.modeling import GaussianRewardModel

    def make(family="qwen2_5_vl", **kwargs):
        kwargs = {"head_hidden_sizes": (16, 8)} | kwargs
        folder, _ = official_checkpoints[family]
        return GaussianRewardModel.from_backbone(folder, reward_token_id=processor.reward_token_id, **kwargs)

    return make


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """Folder of a tiny YOLOS that finds people and dogs everywhere. Treat it as read-only."""
    from tests.detectors import save_yolos

    return save_yolos(tmp_path_factory.mktemp("yolos"))


@pytest.fixture(scope="session")
def judge_folder(backbone_folder, tmp_path_factory):
    """Folder of a tiny Qwen2.5-VL that knows the words Yes and No. Treat it as read-only."""
    from tests.vision_models import save_vision_model

    return save_vision_model(tmp_path_factory.mktemp("judge"), backbone_folder)
