import copy
import json
import math
import os
import re
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from trl import RewardConfig

from tests.hub_stub import HubStub
from tests.warm import run_python
from trl_spatial.gaussian_reward.config import GaussianRewardConfig
from trl_spatial.gaussian_reward.data import DataCollatorForSpatialPreference
from trl_spatial.gaussian_reward.modeling import GaussianRewardModel, spatial_score_lora_config
from trl_spatial.gaussian_reward.processing import load_processor
from trl_spatial.gaussian_reward.scoring import SpatialScore
from trl_spatial.gaussian_reward.trainer import METRICS, GaussianRewardTrainer
from trl_spatial.hub import card_template


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
        own = {
            "eval_dataset",
            "data_collator",
            "compute_metrics",
            "callbacks",
            "processing_class",
            "quantization_config",
        }
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
    speed = {
        f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    }
    assert metrics.keys() - speed - {"epoch"} == {f"eval_{name}" for name in METRICS}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_evaluated_as_a_dataset_is(make_trainer, tmp_path, num_workers):
    """Also if training reads no stream. Uneven batches, and workers that each have some of the shards."""
    case = {"per_device_eval_batch_size": 2, "dataloader_num_workers": num_workers}
    expected = make_trainer(tmp_path, eval_dataset=make_dataset(5), **case).evaluate()
    stream = make_dataset(5).to_iterable_dataset(num_shards=2)
    actual = make_trainer(tmp_path, eval_dataset=stream, **case).evaluate()
    for name in ("loss", "accuracy", "margin", "mean_reward", "mean_std"):
        assert actual[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-5)
    with pytest.raises(ValueError, match=r"`dispatch_batches` True.*Leave it out"):
        GaussianRewardConfig(str(tmp_path), accelerator_config={"dispatch_batches": True})


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
    with pytest.raises(ValueError, match="test, row 0, "):
        trainer.predict(Dataset.from_list([row | {"prompt": ""} for row in rows]))


def test_each_of_several_evaluation_datasets_has_its_own_metrics(make_trainer, tmp_path):
    dataset = make_dataset(4)
    flipped = dataset.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    trainer = make_trainer(tmp_path, eval_dataset={"right": dataset, "wrong": flipped})
    metrics = trainer.evaluate()
    assert metrics["eval_right_margin"] == pytest.approx(-metrics["eval_wrong_margin"], abs=1e-6)
    assert metrics["eval_right_accuracy"] == pytest.approx(1 - metrics["eval_wrong_accuracy"])
    assert "eval_accuracy" not in metrics  # of which one?


@pytest.mark.parametrize(("metric", "is_single"), [("no_such", True), (None, False), ("eval_accuracy", False)])
def test_a_metric_for_the_best_checkpoint_that_will_not_be_there_is_an_error_at_once(
    make_trainer, tmp_path, metric, is_single
):
    """Of several datasets each has its own, and which is meant by the default, `loss`, is for the user to say."""
    datasets = make_dataset(3) if is_single else {"easy": make_dataset(3), "hard": make_dataset(3)}
    case = dict(
        eval_dataset=datasets, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"`metric_for_best_model` is .*, but the evaluation will report .*loss"
    ) as error:
        make_trainer(tmp_path, metric_for_best_model=metric, **case)
    for advised in re.search(r"report (.*)\. Use one", str(error.value))[1].split(", ")[:3]:
        make_trainer(tmp_path / advised, metric_for_best_model=advised, **case).train()


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
    """Also where the last batch is smaller, and where the epoch ends before all batches of an update are there."""
    updates = []
    for batch_size, steps in [(5, 1), (2, 3), (4, 8)]:
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path,
            train_dataset=make_dataset(5),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            center_rewards_coefficient=0.1,
            max_grad_norm=0.0,
            disable_dropout=True,
            train_sampling_strategy="sequential",
            callbacks=[gradients],
            logging_steps=1,
        )
        trainer.train()
        updates.append(gradients.updates[0] | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])})
    expected = updates[0]
    for name in ("lora_B", "head", "reward_token"):
        assert any(name in key for key in expected)
    for update in updates[1:]:
        for name, gradient in expected.items():
            torch.testing.assert_close(update[name], gradient, atol=1e-6, rtol=1e-4)


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


def record_types(model):
    """Types of the inputs and outputs of the adapters' matrices, as they are used."""
    types = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" in name:
            assert module.weight.dtype == torch.float32  # of which nothing is lost on the way to a scorer
            module.register_forward_hook(lambda _, inputs, output: types.add((inputs[0].dtype, output.dtype)))
    return types


def test_a_checkpoint_scores_in_the_precision_of_training(make_trainer, make_image_text_model, tmp_path):
    """The same numbers for the same batch, and in any batch those of the evaluation as far as bfloat16 goes."""
    make_image_text_model("qwen2_5_vl").bfloat16().save_pretrained(tmp_path / "bf16")
    trainer = make_trainer(tmp_path / "run", model=str(tmp_path / "bf16"), bf16=True, use_cpu=True, max_steps=3)
    trainer.train()
    trainer.save_model()
    scorer = SpatialScore.from_pretrained(tmp_path / "run", device="cpu")
    for model in (trainer.model, scorer.model):
        types = record_types(model)
        rows = make_rows(6)
        batch = trainer.data_collator(rows)
        with torch.no_grad(), trainer.autocast_smart_context_manager() if model is trainer.model else nullcontext():
            output = model.eval()(**batch)
        assert types == {(torch.bfloat16, torch.bfloat16)}
        if model is trainer.model:
            expected = output
    assert torch.equal(output.mean, expected.mean) and torch.equal(output.log_std, expected.log_std)

    predictions = trainer.predict(Dataset.from_list(rows)).predictions
    prompts = [row["prompt"] for row in rows]
    for half, column in enumerate(["chosen", "rejected"]):
        mean, std = scorer.score(prompts, [row[column] for row in rows])
        assert np.ptp(mean) > 0.1
        np.testing.assert_allclose(predictions[2 * half], mean, atol=0.02)
        np.testing.assert_allclose(np.exp(predictions[2 * half + 1]), std, atol=0.02)


def test_adapters_keep_the_type_of_their_inputs_without_other_numbers(make_trainer, make_image_text_model, tmp_path):
    """Oracle: PEFT's own way, to fp32 and back."""
    make_image_text_model("qwen2_5_vl").bfloat16().save_pretrained(tmp_path / "bf16")
    updates = []
    for casts in (False, True):
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path / "run", model=str(tmp_path / "bf16"), bf16=True, use_cpu=True, callbacks=[gradients],
            disable_dropout=True, logging_steps=1,
        )  # fmt: skip
        for module in trainer.model.modules():
            if isinstance(module, BaseTunerLayer):
                assert not module.cast_input_dtype_enabled
                module.cast_input_dtype_enabled = casts
        types = record_types(trainer.model)
        trainer.train()
        assert types == {
            (torch.float32 if casts else torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        }
        updates.append(gradients.updates[0] | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])})
    assert_equal_trees(*updates)


# ---------------------------------------------------------------- what is trained


def test_a_batch_of_reverse_pairs_encodes_every_image_once(make_trainer, tmp_path):
    rows = make_dataset(6, perturbed_prompt=lambda row: f"a red {WORDS[row]} to the right of a blue lamp")
    trainer = make_trainer(
        tmp_path, train_dataset=rows, per_device_train_batch_size=4, num_train_epochs=2, max_steps=-1
    )
    sizes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((len(kwargs["input_ids"]), len(kwargs["image_grid_thw"]))),
        with_kwargs=True,
    )
    trainer.train()
    assert sizes == [(8, 4)] * 6


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_pixels_of_bfloat16_train_bit_for_bit_as_those_of_float32(make_trainer, tmp_path, processor, peft_config):
    states, dtypes = [], []
    for collator in (None, DataCollatorForSpatialPreference(processor)):
        trainer = make_trainer(
            tmp_path, bf16=True, use_cpu=True, max_steps=2, eval_dataset=make_dataset(2), peft_config=peft_config,
            data_collator=collator,
        )  # fmt: skip
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: dtypes.append(kwargs["pixel_values"].dtype), with_kwargs=True
        )
        trainer.train()
        states.append({"evaluated": torch.tensor(trainer.evaluate()["eval_loss"])} | trainable(trainer.model))
    assert_equal_trees(*states)
    assert set(dtypes[: len(dtypes) // 2]) == {torch.bfloat16} and set(dtypes[len(dtypes) // 2 :]) == {torch.float32}


def test_head_learning_rate_is_that_of_head_and_reward_token(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.0, head_learning_rate=1e-2, disable_dropout=True)
    before = trainable(trainer.model)
    trainer.train()
    moved = {name for name, param in trainable(trainer.model).items() if not torch.equal(param, before[name])}
    new = {name for name in before if ".head." in name or "reward_token" in name}
    assert moved and {name for name in moved if "weight" in name} == {name for name in new if "weight" in name}
    assert moved <= new


def count_forwards(trainer):
    """Forward passes of the first block of each tower, and whether the vision tower's output needs gradients, in a training."""
    model = trainer.model.get_base_model()
    counts, needs_gradients = {"vision": 0, "text": 0}, []
    blocks = {"vision": model.backbone.visual.blocks[0], "text": model.backbone.language_model.layers[0]}
    for name, block in blocks.items():

        def count(module, inputs, name=name):
            counts[name] += 1

        getattr(block, "norm1" if name == "vision" else "input_layernorm").register_forward_pre_hook(count)
    model.backbone.visual.register_forward_hook(
        lambda module, inputs, output: needs_gradients.append(output.pooler_output.requires_grad)
    )
    trainer.train()
    return counts, needs_gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_stop_before_a_frozen_vision_tower(make_trainer, tmp_path, monkeypatch, use_reentrant):
    """Oracle: transformers' own hooks, which send them through it, for nothing."""
    updates, counted = [], []
    for hooks in (GaussianRewardModel.enable_input_require_grads, PreTrainedModel.enable_input_require_grads):
        monkeypatch.setattr(GaussianRewardModel, "enable_input_require_grads", hooks)
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path,
            callbacks=[gradients],
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
            disable_dropout=True,
            logging_steps=1,
        )
        assert trainer.args.gradient_checkpointing
        counted.append(count_forwards(trainer))
        updates.append(gradients.updates[0] | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])})
    assert counted[0] == ({"vision": 1, "text": 2}, [False])
    assert counted[1] == ({"vision": 2, "text": 2}, [True])
    assert_equal_trees(*updates)
    assert sum("lora_" in name for name in updates[0]) == 2 * 2 * 7


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_vision_tower_with_adapters_trains(make_trainer, tmp_path, use_reentrant):
    config = spatial_score_lora_config(4, 8)
    config.target_modules = r".*visual\.blocks\..*\.(qkv|proj)"
    gradients = Gradients()
    trainer = make_trainer(
        tmp_path,
        peft_config=config,
        callbacks=[gradients],
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    before = trainable(trainer.model)
    counts, needs_gradients = count_forwards(trainer)
    assert (counts, needs_gradients) == ({"vision": 2, "text": 2}, [True])
    moved = [name for name, param in trainable(trainer.model).items() if not torch.equal(param, before[name])]
    assert sum("lora_B" in name for name in moved) == 2 * 2  # of two blocks


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


def test_what_comes_next_in_the_data_is_not_changed_in_silence_on_resuming(make_trainer, tmp_path):
    """Workers take turns with the shards of a stream: others would train on some rows twice and never on others."""
    stream = make_dataset(12).to_iterable_dataset(num_shards=3)
    case = {"train_dataset": stream, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "stream", max_steps=2, **case).train()
    with pytest.raises(
        ValueError, match=r"`dataloader_num_workers` was 1 in the run so far and is 2 now. It cannot be"
    ):
        make_trainer(tmp_path / "stream", max_steps=4, dataloader_num_workers=2, **case).train(True)
    trainer = make_trainer(tmp_path / "stream", max_steps=4, dataloader_num_workers=1, **case)
    assert trainer.train(True).global_step == 4

    pairs = make_dataset(6, perturbed_prompt=lambda row: f"a blue cube {row}")
    case = {"train_dataset": pairs, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "pairs", max_steps=2, **case).train()
    with pytest.raises(
        ValueError, match=r"`use_reverse_pairs` was True in the run so far and is False now. It cannot be"
    ):
        make_trainer(tmp_path / "pairs", max_steps=4, use_reverse_pairs=False, **case).train(True)
    case["dataloader_num_workers"] = 2  # of a dataset that is not a stream, any number gives the same
    assert make_trainer(tmp_path / "pairs", max_steps=4, use_reverse_pairs=True, **case).train(True).global_step == 4


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


def test_the_arguments_of_the_caller_are_left_as_they_were(make_trainer, tmp_path, backbone_folder, processor):
    args = GaussianRewardConfig(str(tmp_path), max_steps=1, model_init_kwargs={"head_hidden_sizes": (16, 8)})
    before = args.to_json_string(), copy.deepcopy(vars(args.accelerator_config))
    stream = make_dataset(3).to_iterable_dataset()  # for which the parent sets `dispatch_batches`
    trainer = GaussianRewardTrainer(
        str(backbone_folder),
        args,
        train_dataset=stream,
        processing_class=processor,
        peft_config=spatial_score_lora_config(4, 8),
    )
    assert (args.to_json_string(), vars(args.accelerator_config)) == before
    assert trainer.args.model_init_kwargs == {"head_hidden_sizes": (16, 8)}
    assert trainer.args.accelerator_config.dispatch_batches is False is not args.accelerator_config.dispatch_batches


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


def test_a_model_without_a_name_needs_a_processor_and_gives_the_output_folder_a_name(
    make_reward_model, processor, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, dataset = make_reward_model(), make_dataset(3)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"no name or path to load its processor from\. Pass `processing_class`"):
        GaussianRewardTrainer(model, train_dataset=dataset)
    arguments = {"train_dataset": dataset, "processing_class": processor}
    assert GaussianRewardTrainer(model, **arguments).args.output_dir == "GaussianReward"
    model.config._name_or_path = "models/tiny/"
    assert GaussianRewardTrainer(model, **arguments).args.output_dir == "tiny-GaussianReward"


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

    with pytest.raises(ValueError, match="train, row 1, `prompt`"):
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
    trainer.save_model()
    trainer.create_model_card(dataset_name="org/pairs", tags="mine")
    assert Image.open(tmp_path / "my-scorer" / "samples.png").width > 300
    card = ModelCard.load(tmp_path / "my-scorer" / "README.md")
    metadata = card.data.to_dict()
    assert metadata["datasets"] == "org/pairs"
    assert {"trl", "reward-trainer", "mine"} <= set(metadata["tags"])
    assert not {"licence", "license", "base_model"} & metadata.keys()  # unknown here, so not claimed
    logs = [log for log in trainer.state.log_history if log["step"] == 2]
    for name in ("easy", "hard"):
        accuracy = next(log[f"eval_{name}_accuracy"] for log in logs if f"eval_{name}_accuracy" in log)
        number = {"easy": 3, "hard": 5}[name]
        assert re.search(rf"\| accuracy \| {accuracy:.4g} \| .+ to .+ \| {number} pairs \| {name} \|", card.text)
        (result,) = [result for result in card.data.eval_results if result.dataset_name == name]
        assert result.metric_value == pytest.approx(accuracy, abs=1e-4) and result.metric_args["num_samples"] == number
    assert 'SpatialScore.from_pretrained("my-scorer", backbone="BACKBONE")' in card.text
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
from pathlib import Path
from datasets import load_from_disk
from trl_spatial import GaussianRewardConfig, GaussianRewardTrainer, SpatialScore
from trl_spatial.gaussian_reward.modeling import spatial_score_lora_config

folder = Path(sys.argv[1])
dataset = load_from_disk(folder / "data")

def train(name, max_steps, **config):
    args = GaussianRewardConfig(
        str(folder / name), max_steps=max_steps, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_token="hf_secret", dataloader_num_workers=0, skip_bad_rows=True, disable_tqdm=True, report_to="none",
        per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-2, max_length=1000, **config,
    )
    trainer = GaussianRewardTrainer(
        "backbone", args, train_dataset=dataset, eval_dataset=dataset, peft_config=spatial_score_lora_config(2, 4)
    )
    trainer.train()
    return trainer

train("refused", 1)
train("all", 3, hub_strategy="all_checkpoints", hub_always_push=True)
train("last", 3, hub_strategy="checkpoint", save_total_limit=1)
# the first checkpoint is the best one, so that the end of training deletes the second
best = dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="num_tokens", greater_is_better=False)
trainer = train("scorer", 2, save_total_limit=1, **best)
trainer.push_to_hub(dataset_name="org/pairs")
prompts, images = dataset["prompt"][:2], dataset["chosen"][:2]
here = SpatialScore(trainer.model, trainer.processing_class).score(prompts, images)
there = SpatialScore.from_pretrained("tester/scorer", backbone="backbone").score(prompts, images)
assert abs(here.mean - there.mean).max() < 1e-6 and abs(here.std - there.std).max() < 1e-6
"""


class SlowHub(HubStub):
    """A Hub where an upload takes longer than a step of training, that remembers what each commit left there."""

    def __init__(self):
        super().__init__()
        self.history = {}  # (repository, title of the commit) → name of the file → its bytes

    def preupload(self, repo, body):
        time.sleep(0.5)
        return (403, {"error": "No."}) if repo == "tester/refused" else super().preupload(repo, body)

    def commit(self, repo, body):
        answer = super().commit(repo, body)
        self.history[repo, self.commits[repo][-1]] = dict(self.files[repo])
        return answer


@pytest.fixture(scope="module")
def pushed(backbone_folder, tmp_path_factory):
    """The folder of trainings that pushed to a Hub, that Hub, and what they wrote to the terminal."""
    folder = tmp_path_factory.mktemp("pushed")
    (folder / "backbone").symlink_to(backbone_folder)
    rows = make_rows(4)
    rows[2]["prompt"] = ""  # so that a list of bad rows is written, which is not for the public
    Dataset.from_list(rows).save_to_disk(folder / "data")
    with SlowHub() as hub:
        environment = os.environ | hub.environment | {"HF_HOME": str(folder / "cache")}
        output = run_python(["-c", PUSH, folder], cwd=folder, env=environment)
    assert output.returncode == 0, output.stderr
    return folder, hub, output.stderr


def test_what_is_pushed_loads_from_the_hub(pushed):
    folder, hub, _ = pushed
    assert (folder / "scorer" / "_bad_rows.jsonl").is_file()
    files = hub.files["tester/scorer"]
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= set(files)
    assert "https://huggingface.co/datasets/org/pairs" in files["README.md"].decode()
    assert 'SpatialScore.from_pretrained("tester/scorer", backbone="BACKBONE")' in files["README.md"].decode()


def test_no_pickle_no_local_path_and_no_token_is_pushed(pushed):
    folder, hub, _ = pushed
    assert {name.partition("/")[0] for name in hub.files["tester/last"] if "/" in name} == {"last-checkpoint"}
    for repo, files in hub.files.items():
        for name, data in files.items():
            assert not name.endswith(PICKLES) and "bad_rows" not in name, (repo, name)
            for secret in (str(folder), "hf_secret", hub.environment["HF_TOKEN"]):
                assert secret.encode() not in data, (repo, name, secret)


def test_what_is_pushed_of_a_checkpoint_is_what_it_holds(pushed):
    """Also where the next checkpoint is written, or this one deleted, before the upload is done."""
    folder, hub, _ = pushed
    weights = "adapter_model.safetensors"
    for step in (1, 2, 3):
        title = f"Training in progress, step {step}"
        held = {path.name: path.read_bytes() for path in (folder / "all" / f"checkpoint-{step}").iterdir()}
        # what resumes a training
        private = ("trainer_state.json", "run.json", "checkpoint.json", *PICKLES)
        model = {name: data for name, data in held.items() if not name.endswith(private)}
        assert len(held) - len(model) == 6 and len(model) >= 6
        at_top = {name: data for name, data in hub.history["tester/all", title].items() if "/" not in name}
        assert at_top.keys() == model.keys()
        # made anew for the Hub: the local path of the backbone is not for others, and the card names the repository
        assert json.loads(at_top["adapter_config.json"])["base_model_name_or_path"] is None
        assert json.loads(at_top["config.json"])["backbone_config"]["_name_or_path"] is None
        for name in ("adapter_config.json", "config.json", "card.json", "README.md"):
            del model[name]
        assert {name: at_top[name] for name in model} == model
        files = hub.history["tester/all", f"{title}, checkpoint"]
        assert {name: files[f"checkpoint-{step}/{name}"] for name in model} == model

        # the same training: of its folders only the last is left
        assert hub.history["tester/last", title][weights] == model[weights]
        files = hub.history["tester/last", f"{title}, checkpoint"]
        assert files[f"last-checkpoint/{weights}"] == model[weights]
    assert [path.name for path in (folder / "last").glob("checkpoint-*")] == ["checkpoint-3"]
    assert [path.name for path in (folder / "scorer").glob("checkpoint-*")] == ["checkpoint-1"]
    assert "Training in progress, step 2" in hub.commits["tester/scorer"]


def test_uploads_that_fail_and_checkpoints_that_cannot_be_resumed_from_are_told(pushed):
    _, hub, shown = pushed
    assert "A checkpoint was not uploaded to the Hub; training continues: " in shown and "403" in shown
    assert not hub.files["tester/refused"]
    assert "`last-checkpoint` on the Hub holds only the model" in shown
