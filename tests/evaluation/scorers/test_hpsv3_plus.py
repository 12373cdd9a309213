"""HPSv3++ against its formula, written out over the states that Qwen3-VL of transformers gives."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, linear, relu
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from recipes.bench.parity import save_qwen2_vl
from trl_spatial.evaluation.scorers import find_scorer, make_scorer
from trl_spatial.evaluation.scorers.hpsv3_plus import HPSv3Plus, save_hpsv3_plus


PROMPTS = ["a red cube to the left of a blue sphere", "a cat", "a lamp behind the table, right next to the window"]
HIDDEN = 32
REWARD_TOKEN = "<|Reward|>"


def heads(generator):
    """Random weights of everything beside the backbone, under their published names."""
    shapes = {
        "rm_head.0": (1024, HIDDEN), "rm_head.3": (16, 1024), "rm_head.5": (2, 16), "cond_encoder.0": (256, 2),
        "cond_encoder.2": (256, 256), "film_gen.0": (HIDDEN, 256), "film_gen.2": (2 * HIDDEN, HIDDEN),
        "cap_encoder.proj": (256, HIDDEN), "cap_encoder.pool_attn": (1, 256), "cap_encoder.out_proj": (1, 256),
    }  # fmt: skip
    weights = {}
    for name, (rows, columns) in shapes.items():
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        weights[f"{name}.bias"] = torch.randn(rows, generator=generator) / 3
    return weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with configuration and tokenizer of a tiny Qwen3-VL, the model, and all weights as they are published."""
    folder = tmp_path_factory.mktemp("hpsv3_plus")
    save_qwen2_vl(folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"patch_size": 16, "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]}, replace_extra_special_tokens=False)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")
        )
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        vision_config={
            "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 32, "patch_size": 16, "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "initializer_range": 0.2,
        },
        **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    config.save_pretrained(folder)
    weights = dict(model.state_dict()) | heads(torch.Generator().manual_seed(1))
    save_hpsv3_plus(weights, folder)
    return folder, model, weights


@pytest.fixture(scope="module")
def scorer(published):
    return make_scorer(f"hpsv3++:{published[0]}", device="cpu")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sizes = ((60, 60), (40, 100), (90, 50))
    return [Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)) for size in sizes]


def formula(state, weights):
    """Mean and logarithm of the deviation of the state `(hidden_size,)` at the reward token."""

    def layer(name, values):
        return linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    capability = layer("cap_encoder.out_proj", layer("cap_encoder.proj", state)).sigmoid()  # one image: attention is 1
    condition = torch.cat([capability, torch.zeros(1)])
    film = layer(
        "film_gen.2", relu(layer("film_gen.0", layer("cond_encoder.2", gelu(layer("cond_encoder.0", condition)))))
    )
    moved = state * (1 + film[:HIDDEN]) + film[HIDDEN:]
    return layer("rm_head.5", relu(layer("rm_head.3", relu(layer("rm_head.0", moved)))))


@torch.no_grad()
def test_scores_are_those_of_the_formula(published, scorer, pictures):
    _, model, weights = published
    reward_token = scorer.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    scores = scorer.score(PROMPTS, pictures)
    for prompt, picture, score in zip(PROMPTS, pictures, scores, strict=True):
        inputs = scorer._prepare([prompt], [picture])
        states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        [place] = (inputs["input_ids"][0] == reward_token).nonzero()[:, 0].tolist()
        mean, log_std = formula(states[place], weights).tolist()
        assert score.mean == pytest.approx(mean, abs=1e-4) and math.log(score.std) == pytest.approx(log_std, abs=1e-4)
    assert len({round(score.mean, 4) for score in scores}) == len(PROMPTS)
    # of a capability of another image, or none, the scores would be others
    other = formula(states[place], weights | {"cap_encoder.out_proj.bias": torch.tensor([9.0])})
    assert abs(other[0].item() - mean) > 1e-3


def test_a_row_does_not_depend_on_its_batch(scorer, pictures):
    together = scorer.score(PROMPTS, pictures)
    alone = [scorer.score([prompt], [picture])[0] for prompt, picture in zip(PROMPTS, pictures, strict=True)]
    assert [score.mean for score in together] == pytest.approx([score.mean for score in alone], abs=1e-4)


def test_it_has_to_be_converted_once_and_other_weights_are_named(published, tmp_path):
    _, _, weights = published
    with pytest.raises(ValueError, match=r"needs a model\. Write a folder .* save_hpsv3_plus"):
        find_scorer("hpsv3++")
    with pytest.raises(ValueError, match=r"group_encoder\.bias is no weight"):
        save_hpsv3_plus(weights | {"group_encoder.bias": torch.zeros(1)}, tmp_path)
    assert not (tmp_path / HPSv3Plus.file).exists()
    partial = {name: weight for name, weight in weights.items() if name != "film_gen.2.bias"}
    for path in published[0].iterdir():
        if path.name != HPSv3Plus.file:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_hpsv3_plus(partial, tmp_path)
    with pytest.raises(ValueError, match=r"film_gen\.2\.bias are missing"):
        make_scorer(f"hpsv3++:{tmp_path}", device="cpu")
