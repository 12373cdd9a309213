import warnings
from importlib.util import find_spec

import pytest
import torch
from trl import TrlParser

from trl_spatial.gaussian_reward.config import GaussianRewardConfig


def test_defaults_are_those_of_the_paper_and_start_on_any_machine(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others, transformers warns about `gradient_checkpointing`
        config = GaussianRewardConfig(str(tmp_path))
    assert config.learning_rate == 2e-6
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert config.get_warmup_steps(100) == 5 and config.lr_scheduler_type == "constant_with_warmup"
    assert config.num_samples == 1000
    assert config.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    assert config.disable_dropout is False


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "nll"},
        {"estimator": "quadrature"},
        {"num_samples": 0},
        {"head_learning_rate": 0.0},
        {"min_pixels": 0},
        {"max_pixels": -1},
        {"max_length": 0},
        {"min_pixels": 1000, "max_pixels": 999},
        {"chat_template_path": "template.jinja"},
        {"eos_token": "</s>"},
        {"pad_to_multiple_of": 8},
        {"trust_remote_code": True},
    ],
    ids=str,
)
def test_an_invalid_field_is_named_with_its_value(tmp_path, wrong):
    with pytest.raises(ValueError) as error:
        GaussianRewardConfig(str(tmp_path), **wrong)
    for field, value in wrong.items():
        assert f"`{field}`" in str(error.value)
        assert repr(value) in str(error.value)


def test_limits_that_meet_are_allowed(tmp_path):
    assert GaussianRewardConfig(str(tmp_path), min_pixels=1000, max_pixels=1000, max_length=None).max_length is None


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_checkpointing_has_one_value_under_both_names(tmp_path, name, value):
    if name not in GaussianRewardConfig.__dataclass_fields__:
        pytest.skip("this version of transformers has one name only")
    config = GaussianRewardConfig(str(tmp_path), **{name: value})
    assert config.gradient_checkpointing is value
    assert getattr(config, "activation_checkpointing", value) is value


def test_fields_can_be_set_on_the_command_line(tmp_path):
    parser = TrlParser(GaussianRewardConfig)
    assert "--objective" in parser.format_help()  # a percent sign in a help text would raise
    (config,) = parser.parse_args_and_config(
        [
            *["--output_dir", str(tmp_path), "--objective", "marginal_nll", "--use_reverse_pairs", "false"],
            *["--head_learning_rate", "1e-4", "--max_pixels", "1048576", "--skip_bad_rows"],
        ]
    )
    assert (config.objective, config.use_reverse_pairs, config.skip_bad_rows) == ("marginal_nll", False, True)
    assert (config.head_learning_rate, config.max_pixels) == (1e-4, 1048576)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`deepspeed` is 'zero2\.json', but the package deepspeed is not installed"):
        GaussianRewardConfig(str(tmp_path), deepspeed="zero2.json")
