"""The tiny Qwen-Image pipeline: whole words, weights of a seed, images that depend on what they are made of."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from qwen_image import build_qwen_image_pipeline, main

from trl_spatial.scenes import make_prompt_dataset


logging.disable_progress_bar()

PROMPTS = ["a red circle left of a blue square", "a blue circle left of a red square", "There is a cat."]
GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}
PLAIN = {"true_cfg_scale": 1.0}
# Qwen/Qwen-Image on the Hub
OFFICIAL_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
OFFICIAL_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@pytest.fixture(scope="module")
def pipeline():
    """A tiny pipeline. Treat it as read-only."""
    return build_qwen_image_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny pipeline, as the recipe saves it. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("qwen_image")
    main([str(folder)])
    return folder


def generate(pipeline, prompts, *, side=32, seeds=None, **kwargs):
    """Images as numbers from 0 to 1, (num_prompts, side, side, 3)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(prompts)]
    kwargs = {"height": side, "width": side, "num_inference_steps": 3, "output_type": "np"} | kwargs
    return pipeline(prompts, generator=generators, **kwargs).images


def state(pipeline):
    return {
        f"{name}.{key}": tensor
        for name in ("text_encoder", "transformer", "vae")
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    random_state = torch.random.get_rng_state()
    first = build_qwen_image_pipeline(seed=1)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.manual_seed(9)
    second, other = (build_qwen_image_pipeline(seed=seed) for seed in (1, 2))
    assert first.tokenizer.backend_tokenizer.to_str() == second.tokenizer.backend_tokenizer.to_str()
    first, second, other = state(first), state(second), state(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name, tensor in first.items() if tensor.ndim > 1 and not name.endswith("gamma")]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("length", ["short", "long"])
def test_every_word_of_a_caption_is_one_token(pipeline, length):
    captions = make_prompt_dataset(150, length=length)["prompt"]
    assert [pipeline.tokenizer.tokenize(caption) for caption in captions] == [
        [word.replace(" ", "Ġ") for word in re.findall(r"'s| ?\w+|[^\w\s]+", caption)] for caption in captions
    ]


def test_the_template_is_as_many_tokens_as_the_pipeline_drops(pipeline):
    before, after = pipeline.prompt_template_encode.split("{}")
    tokens = pipeline.tokenizer.tokenize(before + PROMPTS[0] + after)
    start = pipeline.prompt_template_encode_start_idx
    assert tokens[start - 4 : start] == ["Ċ", "<|im_start|>", "user", "Ċ"]
    assert tokens[start:] == [
        *pipeline.tokenizer.tokenize(PROMPTS[0]),
        "<|im_end|>",
        "Ċ",
        "<|im_start|>",
        "assistant",
        "Ċ",
    ]
    assert pipeline.encode_prompt(PROMPTS[0])[0].shape == (1, len(tokens) - start, 32)


def test_words_of_another_corpus_are_one_token():
    tokenizer = build_qwen_image_pipeline(corpus=["ein grüner Würfel"]).tokenizer
    assert len(tokenizer.tokenize("Würfel grüner ein")) == len(tokenizer.tokenize("grüner Würfel ein")) == 3
    assert len(tokenizer.tokenize("a cat")) > 2


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_the_smallest_image(pipeline, guidance):
    # The fewest steps are two: the last sigma of one is 1, which cannot be stretched to `shift_terminal`.
    kwargs = {"height": 8, "width": 8, "num_inference_steps": 2} | guidance
    assert [image.size for image in pipeline("a cat", **kwargs).images] == [(8, 8)]
    images = pipeline(PROMPTS, output_type="np", **kwargs).images
    assert images.shape == (3, 8, 8, 3) and np.isfinite(images).all()


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("seed", [0, 1])
def test_images_depend_on_prompt_and_generator_and_are_not_saturated(seed, guidance):
    pipeline = build_qwen_image_pipeline(seed=seed)
    images = generate(pipeline, [*PROMPTS, PROMPTS[0]], seeds=[0, 0, 0, 1], **guidance)

    def difference(i, j):
        return np.abs(images[i] - images[j]).mean()

    assert difference(0, 1) > 0.001 and difference(0, 2) > 0.01 and difference(0, 3) > 0.05
    assert ((images == 0) | (images == 1)).mean() < 0.2 and images.std() > 0.1


def test_guidance_changes_images(pipeline):
    plain, guided, other = (
        generate(pipeline, PROMPTS, **kwargs) for kwargs in (PLAIN, GUIDED, GUIDED | {"negative_prompt": "the lamp"})
    )
    assert np.abs(guided - plain).mean() > 0.02 and np.abs(guided - other).mean() > 0.005


def test_a_saved_pipeline_makes_the_same_images(pipeline, folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is type(pipeline)
    assert np.array_equal(*(generate(made, PROMPTS, **GUIDED) for made in (pipeline, loaded)))


def test_the_files_are_those_of_the_official_repository(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("_class_name") == "QwenImagePipeline"
    assert {name: value for name, value in index.items() if not name.startswith("_")} == OFFICIAL_CLASSES
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler.pop("_class_name") == OFFICIAL_CLASSES["scheduler"][1]
    assert {name: value for name, value in scheduler.items() if not name.startswith("_")} == OFFICIAL_SCHEDULER
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}  # none that unpickles


@pytest.mark.parametrize(("multipliers", "factor"), [((1, 2), 2), ((1, 2, 2), 4), ((1, 2, 4, 4), 8)])
def test_every_multiplier_but_the_first_halves_the_image(multipliers, factor):
    pipeline = build_qwen_image_pipeline(vae_multipliers=multipliers, latent_channels=3, vae_channels=4)
    side = 2 * factor  # one token
    assert generate(pipeline, ["a cat"], side=side, output_type="latent", **PLAIN).shape == (1, 1, 12)
    image = torch.zeros(1, 3, 1, side, side)
    assert pipeline.vae.encode(image).latent_dist.mean.shape == (1, 3, 1, 2, 2)
    assert pipeline.vae.decode(torch.zeros(1, 3, 1, 2, 2)).sample.shape == image.shape
