"""The tiny Stable Diffusion 3.5 pipeline: weights of a seed, images that depend on what they are made of."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from sd3 import build_sd3_pipeline, main


logging.disable_progress_bar()

PROMPTS = ["a red circle left of a blue square", "a blue circle left of a red square", "There is a cat."]
GUIDED = {"guidance_scale": 4.5, "negative_prompt": "a dog"}
PLAIN = {"guidance_scale": 1.0}
# stabilityai/stable-diffusion-3.5-medium on the Hub, where T5's tokenizer has the name of an older transformers
OFFICIAL_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture(scope="module")
def pipeline():
    """A tiny pipeline. Treat it as read-only."""
    return build_sd3_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny pipeline, as the recipe saves it. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("sd3")
    main([str(folder)])
    return folder


def generate(pipeline, prompts, *, side=32, seeds=None, **kwargs):
    """Images as numbers from 0 to 1, (num_prompts, side, side, 3)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(prompts)]
    kwargs = {"height": side, "width": side, "num_inference_steps": 3, "output_type": "np"} | kwargs
    return pipeline(prompts, generator=generators, max_sequence_length=32, **kwargs).images


def state(pipeline):
    return {
        f"{name}.{key}": tensor
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    random_state = torch.random.get_rng_state()
    first = state(build_sd3_pipeline(seed=1))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.manual_seed(9)
    second, other = (state(build_sd3_pipeline(seed=seed)) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name, tensor in first.items() if tensor.ndim > 1 and "pos_embed.pos_embed" not in name]
    drawn = [name for name in drawn if not name.endswith("position_ids")]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_the_second_clip_is_padded_as_openclip(pipeline):
    assert pipeline.tokenizer.pad_token == "<|endoftext|>" and pipeline.tokenizer_2.pad_token == "!"
    first, second = (
        tokenizer("a cat", padding="max_length", max_length=77).input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    assert first[:4] == second[:4] and len(first) == len(second) == 77 and first[4:] != second[4:]


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("seed", [0, 1])
def test_images_depend_on_prompt_and_generator_and_are_not_saturated(seed, guidance):
    pipeline = build_sd3_pipeline(seed=seed)
    images = generate(pipeline, [*PROMPTS, PROMPTS[0]], seeds=[0, 0, 0, 1], **guidance)

    def difference(i, j):
        return np.abs(images[i] - images[j]).mean()

    assert difference(0, 1) > 0.01 and difference(0, 2) > 0.02 and difference(0, 3) > 0.05
    assert ((images == 0) | (images == 1)).mean() < 0.2 and images.std() > 0.1


def test_guidance_changes_images(pipeline):
    plain, guided, other = (
        generate(pipeline, PROMPTS, **kwargs) for kwargs in (PLAIN, GUIDED, GUIDED | {"negative_prompt": "the lamp"})
    )
    assert np.abs(guided - plain).mean() > 0.02 and np.abs(guided - other).mean() > 0.005


def test_sizes_are_from_one_token_to_the_positions_there_are(pipeline):
    for side in (8, 128):
        assert generate(pipeline, ["a cat"], side=side).shape == (1, side, side, 3)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        generate(pipeline, ["a cat"], side=136)


def test_a_saved_pipeline_makes_the_same_images(pipeline, folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is type(pipeline)
    assert np.array_equal(*(generate(made, PROMPTS, **GUIDED) for made in (pipeline, loaded)))


def test_the_files_are_those_of_the_official_repository(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("_class_name") == "StableDiffusion3Pipeline"
    classes = {name: value for name, value in index.items() if not name.startswith("_") and value != [None, None]}
    assert classes == OFFICIAL_CLASSES
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"], scheduler["shift_terminal"]) == (3.0, False, None)
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    assert (transformer["qk_norm"], transformer["dual_attention_layers"]) == ("rms_norm", [0])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".model"}  # none that unpickles
