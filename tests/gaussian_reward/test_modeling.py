"""The reward model: every weight comes from the checkpoint, a score is a row's own, and only what should train does."""

import json
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig

from trl_spatial.gaussian_reward.modeling import (
    GaussianHead,
    GaussianRewardModel,
    GaussianRewardModelConfig,
    RewardTokenEmbedding,
    spatial_score_lora_config,
)


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def batch(processor, prompts, images):
    return processor(prompts, images)


def scores(model, batch):
    with torch.no_grad():
        output = model(**batch)
    assert output.mean.dtype == output.log_std.dtype == torch.float32
    return torch.stack([output.mean, output.log_std])  # (2, batch_size)


def head_by_hand(head, hidden):
    """The head in numpy and float64: ReLU layers, then log std = -0.5 + 3.5 · tanh((x + 0.5) / 3.5)."""
    values = hidden.double().numpy()
    weights = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    for layer in (0, 3):
        values = np.maximum(values @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"], 0)
    mean, raw = (values @ weights["layers.6.weight"].T + weights["layers.6.bias"]).T
    return torch.tensor(np.stack([mean, -0.5 + 3.5 * np.tanh((raw + 0.5) / 3.5)]))


# ---------------------------------------------------------------- what it computes


def test_score_is_the_head_at_the_stock_models_hidden_state(make_reward_model, official_checkpoints, family, batch):
    """Oracle: the stock image-text model with a resized embedding, its last hidden state, the head in numpy."""
    model = make_reward_model(family)
    stock = AutoModelForImageTextToText.from_pretrained(official_checkpoints[family][0]).eval()
    embedding = stock.get_input_embeddings().weight.data
    embedding[model.config.reward_token_id] = embedding.mean(0)
    with torch.no_grad():
        hidden = stock(**batch, output_hidden_states=True).hidden_states[-1]
    at_token = hidden[batch["input_ids"] == model.config.reward_token_id]
    expected = head_by_hand(model.head, at_token)
    assert torch.allclose(scores(model, batch).double(), expected, atol=1e-5)
    assert expected.std(-1).min() > 1e-3  # the rows do differ


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_score_does_not_depend_on_the_batch(make_reward_model, processor, family, prompts, images, padding_side):
    model = make_reward_model(family)
    alone = torch.cat(
        [scores(model, processor([prompt], [image])) for prompt, image in zip(prompts, images, strict=True)], dim=1
    )
    order = [3, 0, 4, 2, 1]
    for rows in (range(5), order, [1, 3], [4, 4, 0]):
        together = processor([prompts[i] for i in rows], [images[i] for i in rows], padding_side=padding_side)
        assert torch.allclose(scores(model, together), alone[:, list(rows)], atol=1e-5, rtol=0)


def test_prompt_and_image_both_matter(make_reward_model, processor, family, prompts, images):
    model = make_reward_model(family)
    mean = scores(model, processor(prompts, images))[0]
    other_prompts = scores(model, processor(prompts[::-1], images))[0]
    other_images = scores(model, processor(prompts, images[::-1]))[0]
    assert (mean - other_prompts).abs().max() > 1e-3
    assert (mean - other_images).abs().max() > 1e-3
    mirrored = scores(model, processor(prompts, [image.transpose(0) for image in images]))[0]
    assert (mean - mirrored).abs().min() > 1e-5  # positions reach the score


def test_attention_implementations_agree(make_reward_model, family, batch):
    sdpa, eager = (make_reward_model(family, attn_implementation=name) for name in ("sdpa", "eager"))
    assert torch.allclose(scores(sdpa, batch), scores(eager, batch), atol=1e-5)


def test_reward_token_beyond_the_embedding_matrix(tmp_path, processor, make_image_text_model, batch):
    """A checkpoint with spare rows and one without give the same score: no row of the matrix stands for the token."""
    small = make_image_text_model("qwen2_5_vl", vocab_size=processor.reward_token_id)
    small.save_pretrained(tmp_path / "small")
    spare = make_image_text_model("qwen2_5_vl", vocab_size=processor.reward_token_id + 40)
    state = small.state_dict()
    embedding = state["model.language_model.embed_tokens.weight"]
    state["model.language_model.embed_tokens.weight"] = torch.cat([embedding, embedding.mean(0).expand(40, -1)])
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    spare.load_state_dict(state)
    spare.save_pretrained(tmp_path / "spare")
    results = [
        scores(GaussianRewardModel.from_backbone(tmp_path / name, reward_token_id=processor.reward_token_id), batch)
        for name in ("small", "spare")
    ]
    assert torch.allclose(*results, atol=1e-6)


def test_patches_are_projected_as_by_a_convolution(make_reward_model, make_image_text_model, batch, family):
    ours = make_reward_model(family).backbone.visual.patch_embed
    theirs = make_image_text_model(family).model.visual.patch_embed
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (theirs, ours):
        output = layer(batch["pixel_values"])
        output.square().sum().backward()
        results.append((output, *(param.grad for param in layer.parameters())))
    assert type(ours.proj) is not type(theirs.proj)
    for expected, actual in zip(*results, strict=True):
        assert actual.shape == expected.shape and (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_missing_positions_and_reward_tokens_are_errors(make_reward_model, batch):
    model = make_reward_model()
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(**{key: value for key, value in batch.items() if key != "mm_token_type_ids"})
    for replacement in (0, model.config.reward_token_id):
        spoiled = batch["input_ids"].clone()
        spoiled[1, 0 if replacement else spoiled[1].tolist().index(model.config.reward_token_id)] = replacement
        with pytest.raises(ValueError, match=r"exactly one reward token .*\[1, (0|2), 1, 1, 1\]"):
            model(**{**batch, "input_ids": spoiled})


# ---------------------------------------------------------------- the head


def test_log_std_stays_within_its_bounds_and_keeps_a_slope():
    head = GaussianHead(1, (), 0.0, -4.0, 3.0)
    with torch.no_grad():
        head.layers[-1].weight.copy_(torch.tensor([[1.0], [1.0]]))
        head.layers[-1].bias.zero_()
    raw = torch.linspace(-20, 20, 401)[:, None].requires_grad_()
    mean, log_std = head(raw)
    assert torch.equal(mean, raw[:, 0])
    (slope,) = torch.autograd.grad(log_std.sum(), raw)
    assert log_std.min() >= -4.0 and log_std.max() <= 3.0
    assert (slope[(raw > -8) & (raw < 8)] > 0.03).all() and slope.max() <= 1.0 + 1e-6
    assert head(torch.tensor([[-0.5]]))[1].item() == pytest.approx(-0.5)
    assert head(torch.tensor([[1e4]]))[1].item() == pytest.approx(3.0)


def test_head_computes_in_fp32_under_autocast(make_reward_model, batch):
    model = make_reward_model()
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = scores(model, batch)
    assert torch.allclose(under_autocast.double(), head_by_hand(model.head, seen[0].float()), atol=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in model.head.parameters())


def test_head_computes_in_fp32_with_bf16_weights(make_reward_model):
    # as FSDP2 and DeepSpeed hand them out
    head = make_reward_model().head.to(torch.bfloat16)
    hidden = torch.randn(3, head.layers[0].in_features, generator=torch.Generator().manual_seed(0))
    result = torch.stack(head(hidden))
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), head_by_hand(head, hidden), atol=1e-5)
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_head_and_reward_row_are_fp32_on_a_bf16_backbone(make_reward_model, batch, tmp_path):
    model = make_reward_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for loaded in (model, *(GaussianRewardModel.from_pretrained(tmp_path, dtype=d) for d in ("auto", torch.bfloat16))):
        for name, parameter in loaded.named_parameters():
            fp32 = name.startswith("head.") or "reward_token" in name
            assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert torch.equal(scores(loaded, batch), scores(model, batch))


def test_head_depends_on_its_seed_only(make_reward_model):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = make_reward_model(seed=3).head.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = make_reward_model(seed=3).head.state_dict(), make_reward_model(seed=4).head.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_configuration_is_checked():
    with pytest.raises(ValueError, match=r"log_std_min.*below.*log_std_max.*got 3\.0 and 3\.0"):
        GaussianRewardModelConfig(log_std_min=3.0)
    with pytest.raises(ValueError, match=r"head_dropout.*got 1\.0"):
        GaussianRewardModelConfig(head_dropout=1.0)
    assert GaussianRewardModelConfig().num_labels == 1
    with pytest.raises(ValueError, match="needs `backbone_config` and `reward_token_id`"):
        GaussianRewardModel(GaussianRewardModelConfig())


# ---------------------------------------------------------------- loading


def official_name(name, family):
    name = name.replace("embed_tokens.base.", "embed_tokens.")
    if family == "qwen2_5_vl":
        return name.replace("backbone.visual.", "visual.").replace("backbone.language_model.", "model.")
    return name.replace("backbone.", "model.")


def test_official_checkpoints_load_completely(make_reward_model, official_checkpoints, family):
    """Every weight of both towers is, bit for bit, the one in the file."""
    tensors = dict(official_checkpoints[family][1])
    assert {key.split(".")[0] for key in tensors} == ({"visual", "model"} if family == "qwen2_5_vl" else {"model"})
    model = make_reward_model(family)
    for name, parameter in model.state_dict().items():
        if not name.startswith("head.") and "reward_token" not in name:
            assert torch.equal(parameter, tensors.pop(official_name(name, family))), name
    assert not tensors  # and none was left out


@pytest.mark.parametrize("layout", ["transformers", "untied", "sharded"])
def test_other_layouts_load_completely(tmp_path, official_checkpoints, family, layout, processor):
    """As today's transformers names them, with an LM head of its own, and in several files."""
    folder, tensors = official_checkpoints[family]
    config = json.loads((folder / "config.json").read_text())
    if layout == "transformers":
        stock = AutoModelForImageTextToText.from_pretrained(folder)
        save_file({k: v.clone() for k, v in stock.state_dict().items() if k != "lm_head.weight"}, tmp_path / "m")
        (tmp_path / "m").rename(tmp_path / "model.safetensors")
    elif layout == "untied":
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        save_file({**tensors, "lm_head.weight": torch.zeros(512, 32)}, tmp_path / "model.safetensors")
    else:
        names = sorted(tensors)
        files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = GaussianRewardModel.from_backbone(tmp_path, reward_token_id=processor.reward_token_id)
    for name, parameter in model.state_dict().items():
        if not name.startswith("head.") and "reward_token" not in name:
            assert torch.equal(parameter, tensors[official_name(name, family)]), name


def test_flat_configuration_of_the_hub(tmp_path, official_checkpoints, processor, batch, make_reward_model):
    """Qwen2.5-VL's config.json on the Hub holds the language model's fields at its root, and names M-RoPE as of old."""
    folder, tensors = official_checkpoints["qwen2_5_vl"]
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    section = text["rope_parameters"]["mrope_section"]
    theta = text["rope_parameters"]["rope_theta"]
    flat = {key: text[key] for key in text if key not in ("rope_parameters", "model_type", "layer_types", "dtype")}
    flat |= {key: config[key] for key in config if key.endswith("token_id")}
    flat |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "rope_theta": theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vision_config": {**vision, "model_type": "qwen2_5_vl", "in_chans": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    save_file(tensors, tmp_path / "model.safetensors")
    model = GaussianRewardModel.from_backbone(
        tmp_path, reward_token_id=processor.reward_token_id, head_hidden_sizes=(16, 8)
    )
    assert torch.equal(scores(model, batch), scores(make_reward_model(), batch))


def test_a_missing_weight_is_an_error_that_names_it(tmp_path, official_checkpoints, family, processor):
    folder, tensors = official_checkpoints[family]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    text, vision = ("model.", "visual.") if family == "qwen2_5_vl" else ("model.language_model.", "model.visual.")
    for name in (text + "layers.1.mlp.up_proj.weight", vision + "blocks.0.attn.qkv.bias", text + "norm.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"lacks 1 weights.*" + name.split(text)[-1].split(vision)[-1]):
            GaussianRewardModel.from_backbone(tmp_path, reward_token_id=processor.reward_token_id)


def test_a_whole_model_comes_back(make_reward_model, family, batch, tmp_path):
    model = make_reward_model(family)
    with torch.no_grad():
        model.backbone.get_input_embeddings().reward_token.weight.normal_()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()  # as a trainer that resumes reads them
    for loaded in (GaussianRewardModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(scores(loaded, batch), scores(model, batch))
        assert not any(p.requires_grad for p in loaded.backbone.get_input_embeddings().base.parameters())
    for name in ("head.layers.3.bias", "backbone.visual.blocks.0.attn.qkv.bias"):
        save_file({k: v for k, v in saved.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks 1 weights.*{name}"):
            GaussianRewardModel.from_pretrained(tmp_path)


# ---------------------------------------------------------------- training


def trainable_model(mode, make_reward_model, family="qwen2_5_vl"):
    """The reward model as LoRA, QLoRA or full training sees it."""
    if mode == "full":
        return make_reward_model(family).train()
    model = make_reward_model(family, quantization_config=nf4() if mode == "qlora" else None)
    torch.manual_seed(0)
    return get_peft_model(model, spatial_score_lora_config(rank=4, alpha=8)).train()


def take_steps(model, batch, count=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batch = batch.to(model.device)  # quantized weights are on a GPU if there is one
    for _ in range(count):
        output = model(**batch)
        (output.mean.pow(2).mean() + output.log_std.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_what_training_changes_and_what_it_leaves(make_reward_model, batch, mode, family):
    model = trainable_model(mode, make_reward_model, family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_steps(model, batch)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}

    heads = {n for n in before if ".head." in f".{n}" and (mode == "full" or "modules_to_save" in n)}
    rows = {n for n in before if "reward_token" in n and (mode == "full" or "modules_to_save" in n)}
    assert heads and rows and heads | rows <= changed
    assert not any("embed_tokens.base" in name for name in changed)  # no other row of the embedding, bit for bit
    others = changed - heads - rows
    if mode == "full":
        assert any("visual" in name for name in others) and any("layers.0.mlp" in name for name in others)
    else:
        assert all("lora_" in name for name in others)
        assert sum("lora_B" in name for name in others) == 2 * 7  # two layers, seven linear maps each
    assert all(before[name].dtype == torch.float32 for name in heads | rows)


def test_only_the_language_model_is_quantized(make_reward_model, family):
    model = make_reward_model(family, quantization_config=nf4())
    for name, module in model.named_modules():
        quantized = type(module).__name__ == "Linear4bit"
        if isinstance(module, torch.nn.Linear):
            assert quantized == ("language_model.layers" in name), name
    assert model.is_quantized and model.is_loaded_in_4bit and model.config.quantization_config.load_in_4bit
    kept = nf4()
    kept.llm_int8_skip_modules = ["model.language_model.layers.1"]
    model = make_reward_model(family, quantization_config=kept)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert names and all("layers.0" in name for name in names)
    assert kept.llm_int8_skip_modules == ["model.language_model.layers.1"]


@pytest.mark.parametrize(("mode", "use_reentrant"), [("lora", False), ("lora", True), ("full", False)])
def test_checkpointing_leaves_the_gradients_alone(make_reward_model, batch, mode, use_reentrant, family):
    gradients = []
    for checkpointing in (False, True):
        model = trainable_model(mode, make_reward_model, family)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            if use_reentrant:
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
            assert len(layers) >= 4  # blocks of the vision tower and layers of the language model
        model(**batch).mean.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and any(gradient.abs().sum() > 0 for gradient in plain.values())
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_embedding_of_every_other_token_is_the_matrix():
    base = torch.nn.Embedding(7, 3)
    embedding = RewardTokenEmbedding(base, reward_token_id=9)
    embedding.reset_reward_token()
    ids = torch.tensor([[0, 1, 9, 6], [9, 9, 3, 2]])
    output = embedding(ids)
    mean_row = [sum(column) / 7 for column in zip(*base.weight.tolist(), strict=True)]
    for position in np.ndindex(2, 4):
        expected = mean_row if ids[position] == 9 else base.weight[ids[position]].tolist()
        assert output[position].tolist() == pytest.approx(expected, abs=1e-6)
    output.sum().backward()
    assert base.weight.grad is None and torch.equal(embedding.reward_token.weight.grad, torch.full((1, 3), 3.0))


def test_default_sizes_are_the_papers():
    config = GaussianRewardModelConfig()
    assert (config.head_hidden_sizes, config.head_dropout) == ((1024, 16), 0.05)
    assert (config.log_std_min, config.log_std_max) == (-4.0, 3.0)
    lora = spatial_score_lora_config()
    assert (lora.r, lora.lora_alpha) == (64, 128) and math.isclose(lora.lora_dropout, 0.05)
