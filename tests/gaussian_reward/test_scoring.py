"""The scorer: the same scores alone, in a batch, saved, loaded and merged; wrong folders and rows are named."""

import itertools
import json
import math
import shutil
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from trl_spatial.gaussian_reward.modeling import GaussianRewardModel, spatial_score_lora_config
from trl_spatial.gaussian_reward.scoring import SpatialScore, ahead


@pytest.fixture
def make_scorer(make_reward_model, processor):
    """A function that builds a scorer whose adapter, head and reward token are far from their initial values."""

    def make(family="qwen2_5_vl", adapter=True, **kwargs):
        model = make_reward_model(family)
        torch.manual_seed(0)
        if adapter:
            model = get_peft_model(model, spatial_score_lora_config(rank=4, alpha=8))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        return SpatialScore(model, processor, **kwargs)

    return make


@pytest.fixture
def rows(prompts, images):
    """Forty (prompt, image) rows of different lengths, in no order of length."""
    draw = np.random.default_rng(1).integers(0, 5, (40, 2)).tolist()
    return [prompts[i] for i, _ in draw], [images[j] for _, j in draw]


def difference(one, other):
    assert one.mean.shape == other.mean.shape and one.std.shape == other.std.shape
    return max(np.abs(one.mean - other.mean).max(), np.abs(one.std - other.std).max())


# ---------------------------------------------------------------- scores


def test_scores_are_the_models_row_by_row(make_scorer, processor, rows):
    """Oracle: the model's forward on each row alone."""
    scorer = make_scorer()
    prompts, images = rows
    with torch.no_grad():
        outputs = [scorer.model(**processor([p], [i])) for p, i in zip(prompts, images, strict=True)]
    mean = [output.mean.item() for output in outputs]
    std = [math.exp(output.log_std.item()) for output in outputs]
    assert np.std(mean) > 1e-3
    for batch_size in (1, 3, 8, 64):
        scores = scorer.score(prompts, images, batch_size=batch_size)
        assert scores.mean.dtype == scores.std.dtype == np.float32
        assert np.abs(scores.mean - mean).max() < 1e-5 and np.abs(scores.std - std).max() < 1e-5


def test_rows_of_similar_length_share_a_batch(make_scorer, rows):
    scorer = make_scorer()
    shapes = []
    scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((kwargs["attention_mask"].numel(), kwargs["attention_mask"].sum())),
        with_kwargs=True,
    )
    scorer.score(*rows, batch_size=5)
    padded, tokens = (sum(column) for column in zip(*shapes, strict=True))
    assert padded <= 1.05 * tokens


def test_every_form_of_an_image_scores_the_same(make_scorer, prompts, images, tmp_path):
    scorer = make_scorer()
    path = tmp_path / "image.png"
    images[0].save(path)
    forms = [images[0], str(path), path, path.read_bytes(), {"bytes": path.read_bytes(), "path": None}]
    mean, std = scorer.score([prompts[0]] * len(forms), forms)
    assert np.ptp(mean) < 1e-5 and np.ptp(std) < 1e-5


def test_a_column_of_a_dataset_scores_as_the_list_of_its_images(make_scorer, processor, rows):
    """A column makes a new object at every access, in memory that the one before may have had."""
    prompts, images = rows
    column = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))["image"]
    assert difference(make_scorer().score(prompts, column), make_scorer().score(prompts, images)) < 1e-5
    assert processor(prompts, column)["pixel_values"].equal(processor(prompts, list(column))["pixel_values"])


def test_scoring_leaves_no_graph_and_no_dropout(make_scorer, rows):
    scorer = make_scorer()
    prompts, images = rows
    assert not scorer.model.training
    assert difference(scorer.score(prompts, images), scorer.score(prompts, images)) == 0.0
    assert all(parameter.grad is None for parameter in scorer.model.parameters())


def test_no_rows_give_no_scores(make_scorer):
    scores = make_scorer().score([], [])
    assert scores.mean.shape == scores.std.shape == (0,)
    assert scores.mean.dtype == scores.std.dtype == np.float32


def test_wrong_rows_are_named(make_scorer, prompts, images, tmp_path):
    scorer = make_scorer()
    with pytest.raises(ValueError, match="5 prompts and 4 images"):
        scorer.score(prompts, images[:4])
    with pytest.raises(ValueError, match="two lists"):
        scorer.score("ab", images[:2])
    with pytest.raises(ValueError, match="batch_size"):
        scorer.score(prompts, images, batch_size=0)
    truncated = tmp_path / "truncated.png"
    Image.effect_noise((40, 40), 50).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-300])
    for damaged, message in (
        (truncated, "cannot be decoded"),
        (b"", "cannot be opened"),
        (tmp_path / "missing.png", "cannot be opened"),
        (Image.new("RGB", (7, 0)), "has no pixels"),
    ):
        with pytest.raises(ValueError, match=rf"images\[3\] {message}"):
            scorer.score(prompts, [*images[:3], damaged, images[4]], batch_size=2)


def test_progress_bar_shows_on_long_lists_only(make_scorer, capsys):
    scorer = make_scorer()
    image = Image.new("RGB", (16, 16))
    for count, show_progress, expected in (
        (199, None, False),
        (200, None, True),
        (3, True, True),
        (200, False, False),
    ):
        scorer.score(["a"] * count, [image] * count, batch_size=100, show_progress=show_progress)
        assert ("Scoring" in capsys.readouterr().err) == expected


def test_long_rows_share_fewer_passes_on_a_cpu(make_scorer, rows, monkeypatch):
    scorer = make_scorer()
    expected = scorer.score(*rows, batch_size=40)
    batches = []
    scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr("trl_spatial.gaussian_reward.scoring.MAX_CPU_TOKENS", 100)
    assert difference(scorer.score(*rows, batch_size=4), expected) < 1e-5
    assert sum(num_rows for num_rows, _ in batches) == 40
    assert len({num_rows for num_rows, _ in batches}) > 1
    assert all(num_rows <= max(1, min(4, 100 // length)) for num_rows, length in batches)
    batches.clear()
    monkeypatch.setattr("trl_spatial.gaussian_reward.scoring.MAX_CPU_TOKENS", 1)  # shorter than every row
    scorer.score(rows[0][:3], rows[1][:3])
    assert [num_rows for num_rows, _ in batches] == [1, 1, 1]


def test_rows_of_one_image_encode_it_once(make_scorer, prompts, images):
    scorer = make_scorer()
    apart = scorer.score(prompts, [images[0].copy() for _ in prompts])
    num_images = []
    scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: num_images.append(len(kwargs["image_grid_thw"])), with_kwargs=True
    )
    assert difference(scorer.score(prompts, images[:1] * len(prompts)), apart) < 1e-5
    assert num_images == [1]


# ---------------------------------------------------------------- one batch ahead


def threads_ahead():
    return {thread for thread in threading.enumerate() if thread.name == "ahead"}


def test_the_next_item_and_no_other_is_made_while_one_is_in_use():
    made = []

    def items():
        for item in range(5):
            made.append(item)
            yield item

    for item in ahead(items()):
        end = time.monotonic() + 120
        while len(made) < min(item + 2, 5) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == list(range(min(item + 2, 5)))


def test_an_error_comes_in_its_place_and_ends_the_thread():
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    seen, others = [], threads_ahead()
    with pytest.raises(OSError, match="disk"):
        seen.extend(ahead(items()))
    assert list(itertools.islice(ahead(items()), 2)) == [1, 2]
    with closing(ahead(items())) as stopped:
        assert next(stopped) == 1
    assert threads_ahead() <= others


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_thread_outlives_a_score_that_ends_early(make_scorer, rows, error):
    scorer = make_scorer()

    def stop(module, args):
        raise error("enough")

    others = threads_ahead()
    scorer.model.register_forward_pre_hook(stop)
    with pytest.raises(error, match="enough"):
        scorer.score(*rows, batch_size=4)
    assert threads_ahead() <= others


# ---------------------------------------------------------------- as a reward function


def test_reward_is_the_mean(make_scorer, rows):
    scorer = make_scorer()
    prompts, images = rows
    rewards = scorer(prompts, images, level=[1] * 40, trainer_state=None)
    assert all(type(reward) is float for reward in rewards)
    assert np.abs(np.array(rewards) - scorer.score(prompts, images).mean).max() < 1e-6
    assert scorer(prompts=[], images=[]) == []
    assert scorer.__name__ == "spatial_score"


def test_sampled_reward_follows_the_gaussian(make_reward_model, processor, prompts, images):
    model = make_reward_model(log_std_min=1.0, log_std_max=2.0)  # a standard deviation far from 1
    mean, std = SpatialScore(model, processor).score(prompts[:1], images[:1])
    draws, again = (
        np.array(
            SpatialScore(model, processor, sample=True, generator=torch.Generator().manual_seed(0))(
                prompts[:1] * 100, images[:1] * 100
            )
        )
        for _ in range(2)
    )
    assert std[0] > 2.7
    assert abs(draws.mean() - mean[0]) < 3 * std[0] / 10
    assert draws.std() == pytest.approx(std[0], rel=0.25)
    assert np.array_equal(draws, again)


# ---------------------------------------------------------------- folders


def test_adapter_loaded_and_merged_score_the_same(make_scorer, rows, family, tmp_path):
    scorer = make_scorer(family)
    expected = scorer.score(*rows)
    untrained = SpatialScore(scorer.model.get_base_model(), scorer.processor)
    with scorer.model.disable_adapter():
        assert difference(untrained.score(*rows), expected) > 1e-2  # the adapter does matter
    scorer.save_pretrained(tmp_path / "adapter")
    loaded = SpatialScore.from_pretrained(tmp_path / "adapter", device="cpu")
    assert difference(loaded.score(*rows), expected) < 1e-5
    loaded.merge(tmp_path / "merged")
    assert difference(loaded.score(*rows), expected) < 1e-5
    merged = SpatialScore.from_pretrained(tmp_path / "merged", device="cpu")
    assert isinstance(merged.model, GaussianRewardModel)
    assert difference(merged.score(*rows), expected) < 1e-5
    for folder in ("adapter", "merged"):
        files = {file.name for file in (tmp_path / folder).iterdir()}
        assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
        assert {"config.json", "chat_template.jinja", "tokenizer.json"} <= files


def test_an_adapter_holds_head_and_row_and_little_else(make_scorer, tmp_path):
    scorer = make_scorer()
    scorer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    trained = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter
        for name, parameter in scorer.model.named_parameters()
        if parameter.requires_grad
    }
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensors[name], trained[name]) for name in tensors)


def test_a_fully_trained_model_comes_back(make_scorer, rows, tmp_path):
    scorer = make_scorer(adapter=False)
    expected = scorer.score(*rows)
    scorer.save_pretrained(tmp_path)
    loaded = SpatialScore.from_pretrained(str(tmp_path), device="cpu")
    assert difference(loaded.score(*rows), expected) < 1e-5
    with pytest.raises(ValueError, match="no adapter to merge"):
        loaded.merge(tmp_path / "merged")
    with pytest.raises(ValueError, match="for adapters"):
        SpatialScore.from_pretrained(tmp_path, backbone="somewhere")


def test_head_sizes_and_bounds_are_kept(make_reward_model, processor, rows, tmp_path):
    model = make_reward_model(head_hidden_sizes=(7, 6, 5), log_std_min=-1.0, log_std_max=0.5, head_dropout=0.25)
    scorer = SpatialScore(get_peft_model(model, spatial_score_lora_config(rank=2, alpha=2)), processor)
    scorer.save_pretrained(tmp_path)
    loaded = SpatialScore.from_pretrained(tmp_path, device="cpu")
    assert loaded.model.config.head_hidden_sizes == (7, 6, 5)
    assert loaded.model.config.head_dropout == 0.25
    assert difference(loaded.score(*rows), scorer.score(*rows)) < 1e-5


def test_quantized_backbone(make_image_text_model, processor, rows, tmp_path):
    # bitsandbytes evaluates in blocks of 64 on some CPUs.
    make_image_text_model("qwen2_5_vl", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = GaussianRewardModel.from_backbone(tmp_path / "base", reward_token_id=processor.reward_token_id)
    scorer = SpatialScore(get_peft_model(model, spatial_score_lora_config(rank=2, alpha=2)), processor)
    expected = scorer.score(*rows)
    scorer.save_pretrained(tmp_path / "adapter")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = SpatialScore.from_pretrained(tmp_path / "adapter", quantization_config=config, device="cpu")
    assert any(type(module).__name__ == "Linear4bit" for module in quantized.model.modules())
    assert 0 < difference(quantized.score(*rows), expected) < 0.5
    with pytest.raises(ValueError, match="quantized"):
        quantized.merge(tmp_path / "merged")
    quantized.save_pretrained(tmp_path / "again")  # what was saved beside 4-bit weights loads without them
    again = SpatialScore.from_pretrained(tmp_path / "again", device="cpu")
    assert difference(again.score(*rows), expected) < 1e-5


def test_a_backbone_that_was_named_from_another_folder(processor, rows, tmp_path, backbone_folder, monkeypatch):
    monkeypatch.chdir(backbone_folder.parent)
    model = GaussianRewardModel.from_backbone(backbone_folder.name, reward_token_id=processor.reward_token_id)
    scorer = SpatialScore(get_peft_model(model, spatial_score_lora_config()), processor)
    scorer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert difference(SpatialScore.from_pretrained(tmp_path, device="cpu").score(*rows), scorer.score(*rows)) < 1e-5


def test_moved_backbone(make_scorer, rows, tmp_path, backbone_folder):
    scorer = make_scorer()
    expected = scorer.score(*rows)
    scorer.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/gone/backbone"}))
    with pytest.raises(ValueError, match=r"trained on /gone/backbone.*`backbone=`, or `--backbone`"):
        SpatialScore.from_pretrained(tmp_path, device="cpu")
    loaded = SpatialScore.from_pretrained(tmp_path, backbone=backbone_folder, device="cpu")
    assert difference(loaded.score(*rows), expected) < 1e-5


@pytest.fixture
def adapter_folder(make_scorer, tmp_path):
    make_scorer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def whole_folder(make_scorer, tmp_path):
    make_scorer(adapter=False).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def test_wrong_folders_say_what_is_missing(adapter_folder, whole_folder, backbone_folder, tmp_path):
    def message_of(folder):
        with pytest.raises(ValueError) as error:
            SpatialScore.from_pretrained(folder, device="cpu")
        return str(error.value)

    assert "no file or folder" in message_of(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "lacks config.json, tokenizer.json" in message_of(tmp_path / "empty")
    assert "is a qwen2_5_vl model, not a reward model" in message_of(backbone_folder)
    for folder in (adapter_folder, whole_folder):
        for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
            (folder / name).rename(tmp_path / name)
            assert f"lacks {name}." in message_of(folder)
            (tmp_path / name).rename(folder / name)
    for folder, name in ((adapter_folder, "adapter_model.safetensors"), (whole_folder, "model.safetensors")):
        tensors = load_file(folder / name)
        save_file({k: v for k, v in tensors.items() if "head.layers.3.bias" not in k}, folder / name, {"format": "pt"})
        assert "lacks 1 weights" in message_of(folder) and "head.layers.3.bias" in message_of(folder)
        (folder / name).unlink()
        assert f"lacks {name}." in message_of(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused(adapter_folder, whole_folder, name):
    for folder, weights in ((adapter_folder, "adapter_model.safetensors"), (whole_folder, "model.safetensors")):
        torch.save(load_file(folder / weights), folder / name)
        (folder / weights).unlink()
        with pytest.raises(ValueError, match=rf"is refused: it holds {name}\. Pickles .* can run code"):
            SpatialScore.from_pretrained(folder, device="cpu")


def test_a_missing_shard_is_named(make_scorer, rows, tmp_path):
    scorer = make_scorer(adapter=False)
    scorer.model.save_pretrained(tmp_path, max_shard_size="100KB")
    scorer.processor.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = SpatialScore.from_pretrained(tmp_path, device="cpu")
    assert difference(loaded.score(*rows), scorer.score(*rows)) < 1e-5
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[0].name}"):
        SpatialScore.from_pretrained(tmp_path, device="cpu")


def test_a_tokenizer_of_another_model_is_an_error(adapter_folder):
    config = json.loads((adapter_folder / "config.json").read_text())
    (adapter_folder / "config.json").write_text(json.dumps({**config, "reward_token_id": 3}))
    with pytest.raises(ValueError, match="mixes two models"):
        SpatialScore.from_pretrained(adapter_folder, device="cpu")


@pytest.fixture
def put_into_hub_cache(tmp_path, monkeypatch):
    """A function that puts folders into the Hub's cache on disk as the commits of one repository, the last as main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repo_id, *folders):
        repository = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        commits = [f"{index:040x}" for index in range(len(folders))]
        for folder, commit in zip(folders, commits, strict=True):
            shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commits[-1])
        return commits

    return put


def test_a_hub_id_loads_from_the_cache(adapter_folder, whole_folder, rows, put_into_hub_cache):
    """Read by the Hub's real client, without a network."""
    commits = put_into_hub_cache("org/SpatialScore-tiny", whole_folder, adapter_folder)
    for revision, folder in ((None, adapter_folder), (commits[0], whole_folder), (commits[1], adapter_folder)):
        loaded = SpatialScore.from_pretrained("org/SpatialScore-tiny", revision=revision, device="cpu")
        expected = SpatialScore.from_pretrained(folder, device="cpu").score(*rows)
        assert difference(loaded.score(*rows), expected) < 1e-6


def test_an_adapter_finds_the_revision_of_its_backbone(
    make_image_text_model, processor, rows, put_into_hub_cache, tmp_path
):
    for seed in (0, 1):
        make_image_text_model("qwen2_5_vl", seed=seed).save_pretrained(tmp_path / f"base{seed}")
    commits = put_into_hub_cache("org/base", tmp_path / "base0", tmp_path / "base1")
    model = GaussianRewardModel.from_backbone(
        "org/base", reward_token_id=processor.reward_token_id, revision=commits[0]
    )
    scorer = SpatialScore(get_peft_model(model, spatial_score_lora_config(rank=2, alpha=2)), processor)
    scorer.save_pretrained(tmp_path / "adapter")
    loaded = SpatialScore.from_pretrained(tmp_path / "adapter", device="cpu")
    assert difference(loaded.score(*rows), scorer.score(*rows)) < 1e-5
    newer = SpatialScore.from_pretrained(tmp_path / "adapter", backbone="org/base", device="cpu")
    assert difference(newer.score(*rows), scorer.score(*rows)) > 1e-3


def test_weights_that_are_not_finite_or_not_floating_are_named(adapter_folder, whole_folder):
    for folder, name in ((adapter_folder, "adapter_model.safetensors"), (whole_folder, "model.safetensors")):
        tensors = load_file(folder / name)
        key = next(key for key in tensors if "head.layers.0.weight" in key)
        for wrong, message in ((tensors[key] * math.nan, "not finite"), (tensors[key].long(), "not floating-point")):
            save_file({**tensors, key: wrong}, folder / name, {"format": "pt"})
            with pytest.raises(ValueError, match=rf"{message}.*head\.layers\.0\.weight"):
                SpatialScore.from_pretrained(folder, device="cpu")
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        with pytest.raises(ValueError, match="cannot be read"):
            SpatialScore.from_pretrained(folder, device="cpu")
