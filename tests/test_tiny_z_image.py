"""The tiny Z-Image pipeline: weights of a seed, images that depend on what they are made of."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from z_image import build_z_image_pipeline, main


logging.disable_progress_bar()

PROMPTS = ["a red circle left of a blue square", "a blue circle left of a red square", "There is a cat."]
GUIDED = {"guidance_scale": 3.0, "negative_prompt": ["a dog"]}
PLAIN = {"guidance_scale": 0.0}
# Tongyi-MAI/Z-Image on the Hub
OFFICIAL_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny pipeline, as the recipe saves it. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("z_image")
    main([str(folder)])
    return folder


def generate(pipeline, prompts, *, seeds=None, **kwargs):
    """Images as numbers from 0 to 1, (num_prompts, 32, 32, 3)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(prompts)]
    if "negative_prompt" in kwargs:
        kwargs["negative_prompt"] = kwargs["negative_prompt"] * len(prompts)
    sizes = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    return pipeline(list(prompts), generator=generators, max_sequence_length=32, **sizes, **kwargs).images


def state(pipeline):
    return {
        f"{name}.{key}": tensor
        for name in ("text_encoder", "transformer", "vae")
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    random_state = torch.random.get_rng_state()
    first = state(build_z_image_pipeline(seed=1))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.manual_seed(9)
    second, other = (state(build_z_image_pipeline(seed=seed)) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name, tensor in first.items() if tensor.ndim > 1]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("seed", [0, 1])
def test_images_depend_on_prompt_and_generator_and_are_not_saturated(seed, guidance):
    pipeline = build_z_image_pipeline(seed=seed)
    images = generate(pipeline, [*PROMPTS, PROMPTS[0]], seeds=[0, 0, 0, 1], **guidance)

    def difference(i, j):
        return np.abs(images[i] - images[j]).mean()

    assert difference(0, 1) > 0.001 and difference(0, 2) > 0.01 and difference(0, 3) > 0.05
    assert ((images == 0) | (images == 1)).mean() < 0.2 and images.std() > 0.1


def test_a_saved_pipeline_makes_the_same_images_and_has_the_files_of_the_official_repository(folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert np.array_equal(*(generate(made, PROMPTS, **GUIDED) for made in (build_z_image_pipeline(), loaded)))
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("_class_name") == "ZImagePipeline"
    assert {name: value for name, value in index.items() if not name.startswith("_")} == OFFICIAL_CLASSES
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja"}  # none that unpickles
