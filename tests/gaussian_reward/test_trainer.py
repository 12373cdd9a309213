import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import RewardConfig

from tests.hub_stub import HubStub
from trl_spatial.gaussian_reward.config import GaussianRewardConfig
from trl_spatial.gaussian_reward.model_card import card_template
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel, spatial_score_lora_config
from trl_spatial.gaussian_reward.processing import load_processor
from trl_spatial.gaussian_reward.scoring import SpatialScore
from trl_spatial.gaussian_reward.trainer import GaussianRewardTrainer


WORDS = ["cube", "sphere", "cat", "lamp", "window", "table"]
PICKLES = (".bin", ".pt", ".pth", ".pkl")


def make_rows(num_rows, **columns):
    generator = np.random.default_rng(0)

    def picture(width):
        return Image.fromarray(generator.integers(0, 256, (32, width, 3), dtype=np.uint8))

    return [
        {
            "prompt": f"a red {WORDS[row % 6]} to the left of a blue {WORDS[row // 6 % 6]}",
            "chosen": picture(32),
            "rejected": picture(48),
        }
        | {name: value(row) for name, value in columns.items()}
        for row in range(num_rows)
    ]


def make_dataset(num_rows, **columns):
    return Dataset.from_list(make_rows(num_rows, **columns))


@pytest.fixture
def make_trainer(backbone_folder, processor):
    """
    A function that builds a trainer on a tiny backbone. Further arguments are those of its configuration or, if named
    so, its own.
    """

    def make(output_dir, *, model=None, train_dataset=None, peft_config="lora", **config):
        own = {"eval_dataset", "compute_metrics", "callbacks", "processing_class", "quantization_config"}
        arguments = {"processing_class": processor} | {name: config.pop(name) for name in own & config.keys()}
        config = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "model_init_kwargs": {"head_hidden_sizes": (16, 8)} if model is None else None,
        } | config
        return GaussianRewardTrainer(
            model=str(backbone_folder) if model is None else model,
            args=GaussianRewardConfig(str(output_dir), **config),
            train_dataset=make_dataset(6) if train_dataset is None else train_dataset,
            peft_config=spatial_score_lora_config(4, 8) if peft_config == "lora" else peft_config,
            **arguments,
        )

    return make


def trainable(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def assert_equal_trees(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal_trees(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for item, other in zip(actual, expected, strict=True):
            assert_equal_trees(item, other)
    else:
        assert actual == expected


# ---------------------------------------------------------------- the loss and what is measured


def expected_losses(chosen, rejected, objective, margin):
    """By brute force: a fine Riemann sum over ten standard deviations."""
    difference = chosen.mean.astype(float) - rejected.mean.astype(float) - margin
    std = np.sqrt(chosen.std.astype(float) ** 2 + rejected.std.astype(float) ** 2)
    noise = np.linspace(-10, 10, 20001)
    density = np.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi) * (noise[1] - noise[0])
    z = difference[:, None] + std[:, None] * noise
    if objective == "expected_nll":
        return (np.logaddexp(0, -z) * density).sum(1)
    return -np.log((density / (1 + np.exp(-z))).sum(1))


@pytest.mark.parametrize("objective", ["expected_nll", "marginal_nll"])
def test_evaluation_measures_the_pairs_not_the_batches(make_trainer, tmp_path, objective):
    """Seven pairs in batches of three: every average is the average over seven pairs."""
    rows = make_rows(7, margin=lambda row: 0.1 * row)
    trainer = make_trainer(
        tmp_path,
        eval_dataset=Dataset.from_list(rows),
        per_device_eval_batch_size=3,
        objective=objective,
        estimator="monte_carlo",  # is for training only
        num_samples=1,
    )
    metrics = trainer.evaluate()

    scorer = SpatialScore(trainer.model, trainer.processing_class)
    prompts = [row["prompt"] for row in rows]
    chosen = scorer.score(prompts, [row["chosen"] for row in rows])
    rejected = scorer.score(prompts, [row["rejected"] for row in rows])
    losses = expected_losses(chosen, rejected, objective, 0.1 * np.arange(7))
    assert metrics["eval_loss"] == pytest.approx(losses.mean(), abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((chosen.mean > rejected.mean).mean())
    assert metrics["eval_margin"] == pytest.approx((chosen.mean - rejected.mean).mean(), abs=1e-5)
    assert metrics["eval_mean_reward"] == pytest.approx((chosen.mean + rejected.mean).mean() / 2, abs=1e-5)
    assert metrics["eval_mean_std"] == pytest.approx((chosen.std + rejected.std).mean() / 2, abs=1e-5)
    assert metrics["eval_min_reward"] <= metrics["eval_mean_reward"] <= metrics["eval_max_reward"]


def test_compute_metrics_sees_one_row_per_pair(make_trainer, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        chosen_mean, _, rejected_mean, _ = prediction.predictions
        return {"own": float((chosen_mean > rejected_mean).mean())}

    rows = make_rows(6)
    trainer = make_trainer(
        tmp_path,
        eval_dataset=Dataset.from_list(rows),
        per_device_eval_batch_size=4,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert [array.shape for array in seen[0].predictions] == [(6,)] * 4
    assert metrics["eval_own"] == pytest.approx(metrics["eval_accuracy"])
    scorer = SpatialScore(trainer.model, trainer.processing_class)
    prompts = [row["prompt"] for row in rows]
    for half, column in enumerate(["chosen", "rejected"]):
        mean, std = scorer.score(prompts, [row[column] for row in rows])
        np.testing.assert_allclose(seen[0].predictions[2 * half], mean, atol=1e-5)
        np.testing.assert_allclose(np.exp(seen[0].predictions[2 * half + 1]), std, atol=1e-5)

    # data sets that come later are prepared too
    assert trainer.evaluate(Dataset.from_list(rows))["eval_own"] == metrics["eval_own"]
    prediction = trainer.predict(Dataset.from_list(rows))
    np.testing.assert_allclose(prediction.predictions[0], seen[0].predictions[0])
    assert prediction.metrics["test_accuracy"] == metrics["eval_accuracy"]
    with pytest.raises(ValueError, match="Row 0 of the test dataset"):
        trainer.predict(Dataset.from_list([row | {"prompt": ""} for row in rows]))


def test_each_of_several_evaluation_datasets_has_its_own_metrics(make_trainer, tmp_path):
    dataset = make_dataset(4)
    flipped = dataset.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    trainer = make_trainer(tmp_path, eval_dataset={"right": dataset, "wrong": flipped})
    metrics = trainer.evaluate()
    assert metrics["eval_right_margin"] == pytest.approx(-metrics["eval_wrong_margin"], abs=1e-6)
    assert metrics["eval_right_accuracy"] == pytest.approx(1 - metrics["eval_wrong_accuracy"])
    assert "eval_accuracy" not in metrics  # of which one?


def test_center_rewards_coefficient_pulls_the_means_to_zero(make_trainer, tmp_path):
    dataset = make_dataset(4)
    plain = make_trainer(tmp_path, eval_dataset=dataset)
    centered = make_trainer(tmp_path, eval_dataset=dataset, center_rewards_coefficient=0.5)
    chosen, _, rejected, _ = plain.predict(dataset).predictions
    difference = centered.evaluate()["eval_loss"] - plain.evaluate()["eval_loss"]
    assert difference == pytest.approx(0.5 * ((chosen + rejected) ** 2).mean(), rel=1e-4)


class Gradients(TrainerCallback):
    """Keeps the gradients of every update."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_gradient_accumulation_is_a_larger_batch(make_trainer, tmp_path):
    updates = {}
    for batch_size, steps in [(4, 1), (2, 2), (1, 4)]:
        gradients = Gradients()
        make_trainer(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            disable_dropout=True,
            train_sampling_strategy="sequential",
            callbacks=[gradients],
        ).train()
        (updates[steps],) = gradients.updates
    assert any("lora_B" in name for name in updates[1]) and any("head" in name for name in updates[1])
    assert any("reward_token" in name for name in updates[1])
    for name, gradient in updates[1].items():
        torch.testing.assert_close(updates[2][name], gradient, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(updates[4][name], gradient, atol=1e-6, rtol=1e-4)


def test_training_learns_the_pairs(make_trainer, tmp_path):
    dataset = make_dataset(4)
    trainer = make_trainer(
        tmp_path,
        train_dataset=dataset,
        eval_dataset=dataset,
        per_device_train_batch_size=4,
        max_steps=25,
        logging_steps=5,
        head_learning_rate=3e-2,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1.0
    assert after["eval_loss"] < 0.3 < before["eval_loss"]
    log = trainer.state.log_history[0]
    for name in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "mean_std", "num_tokens"):
        assert math.isfinite(log[name])


def test_rewards_are_not_rounded_to_bfloat16(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, use_cpu=True)
    trainer.train()
    for array in trainer.predict(make_dataset(4)).predictions:
        assert not np.array_equal(array, torch.from_numpy(array).bfloat16().float().numpy())


# ---------------------------------------------------------------- what is trained


def test_head_learning_rate_is_that_of_head_and_reward_token(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.0, head_learning_rate=1e-2, disable_dropout=True)
    before = trainable(trainer.model)
    trainer.train()
    moved = {name for name, param in trainable(trainer.model).items() if not torch.equal(param, before[name])}
    new = {name for name in before if ".head." in name or "reward_token" in name}
    assert moved and {name for name in moved if "weight" in name} == {name for name in new if "weight" in name}
    assert moved <= new


@pytest.mark.parametrize("disable", [None, True])
def test_dropout_is_kept_unless_it_is_disabled(make_trainer, tmp_path, disable):
    config = {} if disable is None else {"disable_dropout": disable}
    trainer = make_trainer(tmp_path, **config)
    rates = {name: module.p for name, module in trainer.model.named_modules() if isinstance(module, torch.nn.Dropout)}
    expected = {0.0} if disable else {0.05}
    assert {rate for name, rate in rates.items() if "lora_dropout" in name} == expected
    assert {rate for name, rate in rates.items() if "head" in name} == expected


def test_full_training_is_in_fp32_and_leaves_the_embedding_of_other_tokens_alone(
    make_trainer, make_image_text_model, tmp_path
):
    make_image_text_model("qwen2_5_vl").bfloat16().save_pretrained(tmp_path / "bf16")
    trainer = make_trainer(tmp_path, model=str(tmp_path / "bf16"), peft_config=None)
    embedding = trainer.model.backbone.get_input_embeddings()
    base, token = embedding.base.weight.clone(), embedding.reward_token.weight.clone()
    before = trainable(trainer.model)
    trainer.train()
    assert torch.equal(embedding.base.weight, base) and not torch.equal(embedding.reward_token.weight, token)
    assert {param.dtype for param in before.values()} == {torch.float32}
    moved = [name for name, param in trainable(trainer.model).items() if not torch.equal(param, before[name])]
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)


def test_a_frozen_head_or_reward_token_is_refused(make_trainer, tmp_path):
    for modules_to_save in (None, ["head"], ["reward_token"]):
        config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=modules_to_save)
        with pytest.raises(ValueError, match="spatial_score_lora_config"):
            make_trainer(tmp_path, peft_config=config)


def test_quantized_training_keeps_what_is_trained_in_fp32_and_moves_it(make_trainer, backbone_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = make_trainer(
        tmp_path, quantization_config=four_bit, learning_rate=2e-6, max_steps=2, optim="adamw_torch"
    )
    before = trainable(trainer.model)
    assert {param.dtype for param in before.values()} == {torch.float32}
    trainer.train()
    after = trainable(trainer.model)
    assert all(not torch.equal(after[name], before[name]) for name in before if "lora_A" not in name)
    trainer.save_model()

    # going on from the saved adapter starts from exactly what was saved
    model = GaussianRewardModel.from_backbone(
        backbone_folder,
        reward_token_id=trainer.processing_class.reward_token_id,
        quantization_config=four_bit,
        head_hidden_sizes=(16, 8),
    )
    model = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    again = make_trainer(tmp_path / "again", model=model, peft_config=None)
    assert_equal_trees(trainable(again.model), after)


# ---------------------------------------------------------------- saving, resuming


@pytest.mark.parametrize(
    "case",
    [
        {"estimator": "monte_carlo", "num_samples": 8},
        {"estimator": "monte_carlo", "num_samples": 8, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
        {"peft_config": None, "head_learning_rate": 3e-3},
        {"num_shards": 1},
        {"num_shards": 2, "dataloader_num_workers": 2},
    ],
    ids=["lora", "lora, workers, accumulation", "full", "stream", "stream, workers"],
)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(make_trainer, tmp_path, case):
    """With dropout. Five rows: the interruption falls into the middle of an epoch, and of a pass over the stream."""
    case = dict(case)
    dataset = make_dataset(5)
    if "num_shards" in case:
        dataset = dataset.to_iterable_dataset(num_shards=case.pop("num_shards"))
    case |= {"train_dataset": dataset, "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "warmup_steps": 3}
    whole = make_trainer(tmp_path / "whole", **case)
    whole.train()
    interrupted = make_trainer(tmp_path / "interrupted", **case)
    interrupted.add_callback(StopAfter(4))
    interrupted.train()
    assert interrupted.state.global_step == 4
    resumed = make_trainer(tmp_path / "interrupted", **case)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6

    start = trainable(make_trainer(tmp_path, **case).model)
    assert not any(
        torch.equal(param, start[name]) for name, param in trainable(whole.model).items() if "weight" in name
    )
    assert_equal_trees(trainable(resumed.model), trainable(whole.model))
    assert_equal_trees(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    for folder in ("whole", "interrupted"):
        assert (tmp_path / folder / "checkpoint-6").is_dir()
    weights = "model.safetensors" if "peft_config" in case else "adapter_model.safetensors"
    assert_equal_trees(
        load_file(tmp_path / "interrupted" / "checkpoint-6" / weights),
        load_file(tmp_path / "whole" / "checkpoint-6" / weights),
    )


class StopAfter(TrainerCallback):
    """Ends the training after a step, as someone who presses Ctrl-C after its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_checkpoints_and_the_final_folder_load_and_score_alike(make_trainer, tmp_path, peft_config, prompts, images):
    trainer = make_trainer(tmp_path, peft_config=peft_config, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    expected = SpatialScore(trainer.model, trainer.processing_class).score(prompts, images)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        scores = SpatialScore.from_pretrained(folder).score(prompts, images)
        np.testing.assert_allclose(scores.mean, expected.mean, atol=1e-6)
        np.testing.assert_allclose(scores.std, expected.std, atol=1e-6)
        assert not (folder / "training_args.bin").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix in PICKLES]


def test_a_whole_reward_model_can_be_trained_further(make_trainer, tmp_path):
    first = make_trainer(tmp_path / "first", peft_config=None)
    first.save_model()
    second = make_trainer(tmp_path / "second", model=str(tmp_path / "first"), peft_config=None)
    assert_equal_trees(trainable(second.model), trainable(first.model))


def test_an_adapter_as_the_name_of_a_model_says_how_to_go_on(make_trainer, tmp_path):
    make_trainer(tmp_path / "first").save_model()
    with pytest.raises(ValueError, match=r"holds an adapter.*is_trainable=True"):
        make_trainer(tmp_path / "second", model=str(tmp_path / "first"))


def test_models_are_accepted_as_name_object_or_adapter(make_trainer, tmp_path, make_reward_model, processor):
    dataset = make_dataset(3)
    by_name = make_trainer(tmp_path, eval_dataset=dataset)
    model = make_reward_model(seed=42)  # the default seed of the arguments
    by_object = make_trainer(tmp_path, model=model, eval_dataset=dataset)
    adapter = get_peft_model(make_reward_model(seed=42), spatial_score_lora_config(4, 8))
    by_adapter = make_trainer(
        tmp_path, model=adapter, peft_config=None, eval_dataset=dataset, processing_class=processor
    )
    losses = [trainer.evaluate()["eval_loss"] for trainer in (by_name, by_object, by_adapter)]
    assert losses[1] == losses[0] == losses[2]
    assert by_name.args.model_init_kwargs == {"head_hidden_sizes": (16, 8)}


def test_wrong_types_are_named(make_trainer, tmp_path, make_reward_model, processor, make_image_text_model):
    dataset = make_dataset(3)
    with pytest.raises(TypeError, match="`GaussianRewardConfig`, got `RewardConfig`"):
        GaussianRewardTrainer(
            make_reward_model(),
            RewardConfig(str(tmp_path), bf16=False),
            train_dataset=dataset,
            processing_class=processor,
        )
    with pytest.raises(TypeError, match="got `Qwen2_5_VLForConditionalGeneration`"):
        make_trainer(tmp_path, model=make_image_text_model("qwen2_5_vl"))
    with pytest.raises(TypeError, match="`SpatialScoreProcessor`, got `Qwen2Tokenizer"):
        make_trainer(tmp_path, processing_class=processor.tokenizer)
    model = make_reward_model()
    model.config.reward_token_id += 1
    with pytest.raises(ValueError, match="reads its score at token"):
        make_trainer(tmp_path, model=model)


def test_the_processor_is_loaded_with_the_limits_of_the_image_size_and_saved(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, processing_class=None, min_pixels=1024, max_pixels=1024)
    trainer.save_model()
    for processor in (trainer.processing_class, load_processor(tmp_path)):
        small, large = processor.num_tokens(["a", "a"], [(8, 8), (320, 320)])
        assert small == large  # both become 32 x 32 pixels, four image tokens
        batch = processor(["a"], [Image.new("RGB", (320, 320))])
        assert batch["mm_token_type_ids"].sum() == 4 and batch["pixel_values"].shape[0] == 16
    with pytest.raises(ValueError, match="`max_pixels` is 1024, but the processor you passed"):
        make_trainer(tmp_path, max_pixels=1024)


# ---------------------------------------------------------------- bad rows, streams


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_bad_rows_are_skipped_counted_and_listed(make_trainer, tmp_path, kind, caplog):
    rows = make_rows(6)
    rows[1]["prompt"] = ""
    rows[4]["prompt"] = "cube " * 100
    dataset = Dataset.from_list(rows) if kind == "map" else IterableDataset.from_generator(lambda: iter(rows))
    (tmp_path / "_bad_rows.jsonl").write_text("of an earlier run\n")
    trainer = make_trainer(tmp_path, train_dataset=dataset, skip_bad_rows=True, max_length=100, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
    if kind == "map":
        assert len(trainer.train_dataset) == 4
    listed = {json.loads(line)["row"] for line in (tmp_path / "_bad_rows.jsonl").read_text().splitlines()}
    assert listed == {1, 4}
    assert "Left out 2" in caplog.text

    with pytest.raises(ValueError, match="Row 1 of the train dataset, column `prompt`"):
        make_trainer(tmp_path, train_dataset=dataset, max_length=100).train()


# ---------------------------------------------------------------- the card and the Hub


def test_the_card_holds_what_was_measured(make_trainer, tmp_path):
    trainer = make_trainer(
        tmp_path / "my-scorer",
        eval_dataset={"easy": make_dataset(3), "hard": make_dataset(5)},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        head_learning_rate=3e-4,
    )
    trainer.train()
    trainer.create_model_card(dataset_name="org/pairs", tags="mine")
    card = ModelCard.load(tmp_path / "my-scorer" / "README.md")
    metadata = card.data.to_dict()
    assert metadata["datasets"] == "org/pairs"
    assert {"trl", "reward-trainer", "mine"} <= set(metadata["tags"])
    assert not {"licence", "license", "base_model"} & metadata.keys()  # unknown here, so not claimed
    logs = [log for log in trainer.state.log_history if log["step"] == 2]
    for name in ("easy", "hard"):
        accuracy = next(log[f"eval_{name}_accuracy"] for log in logs if f"eval_{name}_accuracy" in log)
        assert f"| {name}_accuracy | {accuracy:.4g} |" in card.text
    assert 'SpatialScore.from_pretrained("my-scorer")' in card.text
    assert "| learning rate of head and reward token | 0.0003 |" in card.text
    assert "{{" not in card.text.replace("{{TRL", "").replace("{{Enhancing", "")
    assert str(tmp_path) not in card.text


def test_an_unevaluated_model_says_so_and_an_unknown_template_is_an_error(make_trainer, tmp_path):
    make_trainer(tmp_path).save_model()
    assert "not evaluated" in (tmp_path / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match=r"no\.md"):
        card_template("no.md")


PUSH = """
import sys
from datasets import load_from_disk
from trl_spatial import GaussianRewardConfig, GaussianRewardTrainer, SpatialScore
from trl_spatial.gaussian_reward.modeling import spatial_score_lora_config

backbone, dataset, output_dir = sys.argv[1:]
dataset = load_from_disk(dataset)
args = GaussianRewardConfig(
    output_dir, max_steps=2, save_steps=1, push_to_hub=True, hub_strategy="every_save",
    hub_always_push=True, dataloader_num_workers=0, skip_bad_rows=True, disable_tqdm=True,
    per_device_train_batch_size=1, gradient_accumulation_steps=1, max_length=1000,
)
trainer = GaussianRewardTrainer(backbone, args, train_dataset=dataset, peft_config=spatial_score_lora_config(2, 4))
trainer.train()
trainer.push_to_hub(dataset_name="org/pairs")
prompts, images = dataset["prompt"][:2], dataset["chosen"][:2]
here = SpatialScore(trainer.model, trainer.processing_class).score(prompts, images)
there = SpatialScore.from_pretrained("tester/scorer").score(prompts, images)
assert abs(here.mean - there.mean).max() < 1e-6 and abs(here.std - there.std).max() < 1e-6
"""


def test_what_is_pushed_loads_from_the_hub_and_holds_no_pickle(backbone_folder, tmp_path):
    rows = make_rows(3)
    rows[2]["prompt"] = ""  # so that a list of bad rows is written, which is not for the public
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with HubStub() as hub:
        subprocess.run(
            [sys.executable, "-c", PUSH, str(backbone_folder), str(tmp_path / "data"), str(tmp_path / "scorer")],
            env=os.environ | hub.environment | {"HF_HOME": str(tmp_path / "cache")},
            check=True,
            timeout=300,
        )
    assert (tmp_path / "scorer" / "_bad_rows.jsonl").is_file()
    (repo, files) = next(iter(hub.files.items()))
    assert repo == "tester/scorer"
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json", "README.md"} <= set(
        files
    )
    assert not [name for name in files if name.endswith(PICKLES) or "bad_rows" in name]
    assert "Training in progress, step 1" in hub.commits[repo]
    assert "https://huggingface.co/datasets/org/pairs" in files["README.md"].decode()
    assert 'SpatialScore.from_pretrained("tester/scorer")' in files["README.md"].decode()
