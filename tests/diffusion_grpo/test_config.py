import dataclasses
import math
import typing
import warnings

import pytest
import torch
from transformers import TrainingArguments
from trl import TrlParser

from trl_spatial.diffusion_grpo.config import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo.sde import sde_window


FLOATS = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "beta", "epsilon", "epsilon_high", "kl_mask")  # fmt: skip


def make_config(tmp_path, **kwargs):
    return DiffusionGRPOConfig(str(tmp_path), use_cpu=True, **kwargs)


def test_defaults_are_those_of_the_paper_and_start_on_any_machine(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others, transformers warns about `gradient_checkpointing`
        config = DiffusionGRPOConfig(str(tmp_path))
    assert (config.num_generations, config.top_k, config.num_kept) == (24, 6, 12)
    assert (config.learning_rate, config.epsilon, config.beta, config.num_inference_steps) == (3e-4, 1e-4, 0.01, 6)
    assert (config.height, config.width, config.guidance_scale, config.noise_level) == (512, 512, 3.5, 0.9)
    assert (config.eval_num_inference_steps, config.eval_height, config.eval_width) == (28, None, None)
    assert (config.ema_decay, config.ema_steps, config.weight_decay, config.max_grad_norm) == (0.9, 8, 1e-4, 1.0)
    assert (config.adam_beta1, config.adam_beta2, config.lr_scheduler_type) == (0.9, 0.999, "constant")
    assert config.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    # eight prompts per update on one device: fewer are warned about
    assert (config.num_prompts_per_device, config.num_updates_per_rollout) == (8, 1)


def test_there_are_few_fields(tmp_path):
    names = {field.name for field in dataclasses.fields(DiffusionGRPOConfig)}
    own = names - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(own) <= 32


@pytest.mark.parametrize(
    ("fields", "num_prompts", "num_updates"),
    [
        ({"steps_per_generation": 48}, 16, 2),
        ({"num_iterations": 3}, 8, 3),
        ({"steps_per_generation": 48, "num_iterations": 2}, 16, 4),
        ({"top_k": None}, 4, 1),
        ({"top_k": 1, "gradient_accumulation_steps": 1}, 2, 1),
        # a group may be spread over several batches
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}, 1, 1),
    ],
    ids=str,
)
def test_sizes_of_a_rollout(tmp_path, fields, num_prompts, num_updates):
    config = make_config(tmp_path, **fields)
    assert config.num_prompts_per_device == num_prompts
    assert config.num_updates_per_rollout == num_updates
    num_kept = config.num_prompts_per_device * config.num_kept
    assert num_kept == config.per_device_train_batch_size * config.num_batches_per_rollout


@pytest.mark.parametrize(
    "wrong",
    [
        {"dynamics": "ode"},
        {"scale_rewards": "std"},
        {"multi_objective_aggregation": "sum"},
        {"advantage_scope": "all"},
        {"kl_estimator": "k3"},
        {"num_generations": 1},
        {"num_iterations": 0},
        {"rollout_batch_size": 0},
        {"steps_per_generation": 0},
        {"num_inference_steps": 1},
        {"height": 0},
        {"eval_width": 0},
        {"max_sequence_length": 0},
        {"guidance_scale": -1.0},
        {"ema_steps": 0},
        {"ema_decay": 1.0},
        {"beta": -0.1},
        {"epsilon": 0.0},
        # what would train weights that are not numbers
        *({name: math.nan} for name in (*FLOATS, "noise_level")),
        *({name: math.inf} for name in (*FLOATS, "noise_level")),
        {"noise_level": 1e30},
        {"learning_rate": 2.0},
        {"learning_rate": -1e-4},
        {"adam_beta1": 1.0},
        {"reward_weights": [1.0, math.nan]},
        {"reward_weights": [1.0, math.inf]},
        {"reward_weights": [0.0, 0.0]},
        {"epsilon_high": -1e-4},
        {"kl_mask": 0.0},
        {"top_k": 13, "num_generations": 24},
        {"top_k": 0},
        {"noise_level": 0.0},
        {"noise_level": 1.1, "dynamics": "cps"},
        {"ratio_norm": True, "kl_mask": 1e-5},
        {"sde_window_range": [0, 2], "sde_window_size": None},
        {"sde_window_size": 3, "sde_window_range": [0, 2]},
        {"sde_window_size": 2, "sde_window_range": [4, 6]},  # the last of six steps is never stochastic
        {"sde_window_size": 6},
        {"steps_per_generation": 36},
        {"gradient_accumulation_steps": 25, "per_device_train_batch_size": 4},
        {"fp16": True},
        {"auto_find_batch_size": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": {"reuse_activations": "yes"}},
        {"gradient_checkpointing_kwargs": {"reuse_activations": True}, "gradient_checkpointing": False},
    ],
    ids=str,
)
def test_an_invalid_field_is_named_with_its_value(tmp_path, wrong):
    with pytest.raises(ValueError) as error:
        make_config(tmp_path, **wrong)
    for field, value in wrong.items():
        assert f"`{field}`" in str(error.value)
        assert (value if isinstance(value, str) else repr(value)) in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 25},
        {"gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 20},
        {"gradient_accumulation_steps": 10, "steps_per_generation": 20},
        {"gradient_accumulation_steps": 6, "steps_per_generation": 20},
        {"gradient_accumulation_steps": 20, "steps_per_generation": 20},
    ],
    ids=str,
)
def test_the_nearest_valid_batch_sizes_are_named(tmp_path, fields):
    with pytest.raises(ValueError) as error:
        make_config(tmp_path, **fields)
    name = "steps_per_generation" if "steps_per_generation" in fields else "gradient_accumulation_steps"
    named = [int(word.strip(",.:")) for word in str(error.value).split() if word.strip(",.:").isdigit()]

    def is_valid(value):
        try:
            make_config(tmp_path, **{**fields, name: value})
        except ValueError:
            return False
        return True

    below = [value for value in range(1, fields[name]) if is_valid(value)][-1:]
    above = next(value for value in range(fields[name] + 1, 200) if is_valid(value))
    assert {*below, above} <= set(named)


def test_prompts_per_rollout_are_named_for_all_processes(tmp_path, monkeypatch):
    """48 prompts do not go into 32 processes: 4 images times 4 or 5 are not whole groups of 12."""
    monkeypatch.setattr(TrainingArguments, "world_size", 32)
    for steps in (4, 5):
        with pytest.raises(
            ValueError, match=r"Use `gradient_accumulation_steps` 3 or 6 \(32 or 64 prompts per rollout of 32 "
        ):
            make_config(tmp_path, gradient_accumulation_steps=steps)
    assert [make_config(tmp_path, gradient_accumulation_steps=steps).num_prompts for steps in (3, 6)] == [32, 64]


def test_the_default_window_is_in_the_first_half(tmp_path):
    for settings, steps in (
        ({"sde_window_size": 2}, range(3)),
        ({"sde_window_size": 2, "num_inference_steps": 10}, range(5)),
        ({"sde_window_size": 4}, range(4)),  # or as much as the window needs
        ({}, range(5)),
    ):
        args = make_config(tmp_path, **settings)
        windows = [
            sde_window(
                args.num_inference_steps, args.sde_window_size, args.sde_window_range, seed=0, rollout_index=index
            )
            for index in range(40)
        ]
        assert set().union(*windows) == set(steps)


def test_what_is_left_out_has_a_value(tmp_path):
    config = make_config(tmp_path)
    assert (config.num_batches_per_rollout, config.sampling_batch_size) == (24, 4)
    changed = dataclasses.replace(config, gradient_accumulation_steps=48, per_device_train_batch_size=2)
    assert (changed.num_batches_per_rollout, changed.sampling_batch_size) == (48, 2)
    own = {field.name: typing.get_type_hints(DiffusionGRPOConfig)[field.name] for field in dataclasses.fields(config)}
    for name, hint in own.items():
        if name not in {field.name for field in dataclasses.fields(TrainingArguments)}:
            assert (getattr(config, name) is None) <= (type(None) in typing.get_args(hint)), name


@pytest.mark.parametrize(
    ("kwargs", "batch_size"),
    [
        ({}, 4),  # of the rollout's size: its batch
        ({"per_device_eval_batch_size": 2}, 2),
        ({"eval_height": 1024, "eval_width": 1024, "rollout_batch_size": 24}, 6),
        ({"eval_height": 1024, "eval_width": 1024, "rollout_batch_size": 3}, 1),
        ({"eval_height": 256, "eval_width": 256}, 8),
        ({"eval_height": 528}, 3),  # rounded down
    ],
)
def test_a_batch_of_evaluation_has_no_more_pixels_than_one_of_the_rollout(tmp_path, kwargs, batch_size):
    assert make_config(tmp_path, **kwargs).eval_sampling_batch_size == batch_size


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_checkpointing_has_one_value_under_both_names(tmp_path, name, value):
    if name not in DiffusionGRPOConfig.__dataclass_fields__:
        pytest.skip("this version of transformers has one name only")
    config = DiffusionGRPOConfig(str(tmp_path), **{name: value})
    assert config.gradient_checkpointing is value
    assert getattr(config, "activation_checkpointing", value) is value


def test_fields_can_be_set_on_the_command_line(tmp_path):
    parser = TrlParser(DiffusionGRPOConfig)
    assert "--noise_level" in parser.format_help()  # a percent sign in a help text would raise
    (config,) = parser.parse_args_and_config(
        [
            *["--output_dir", str(tmp_path), "--dynamics", "cps", "--noise_level", "0.8", "--top_k", "3"],
            *["--sde_window_size", "2", "--sde_window_range", "1", "4", "--reward_weights", "1", "0.5"],
            *["--ratio_norm", "true", "--kl_estimator", "velocity", "--use_cpu"],
        ]
    )
    assert (config.dynamics, config.noise_level, config.top_k) == ("cps", 0.8, 3)
    assert (config.sde_window_size, config.sde_window_range, config.reward_weights) == (2, [1, 4], [1.0, 0.5])
    assert (config.ratio_norm, config.kl_estimator) == (True, "velocity")


@pytest.mark.parametrize("value", ["zero2.json", {"zero_optimization": {"stage": 2}}])
def test_deepspeed_is_refused_in_words(tmp_path, value):
    with pytest.raises(ValueError, match=r"`deepspeed` is .*zero.*not trained with DeepSpeed.*fsdp2\.yaml"):
        DiffusionGRPOConfig(str(tmp_path), deepspeed=value)
