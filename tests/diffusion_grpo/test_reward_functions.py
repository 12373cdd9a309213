"""Oracles: NumPy's statistics, and the message a user would need."""

import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from trl_spatial.diffusion_grpo.runtime.reward_functions import RewardFunctions, reward_metrics


PROMPTS = ["a", "bb", "ccc"]
IMAGES = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]


def length(prompts, images, **columns):
    return [float(len(prompt)) for prompt in prompts]


def redness(prompts, images, **columns):
    return [image.getpixel((0, 0))[0] for image in images]


def returning(value):
    def reward(prompts, images, **columns):
        return value

    return reward


class Judge:
    def __call__(self, prompts, images, **columns):
        return [0.5] * len(images)


class TestCalling:
    def test_puts_the_functions_side_by_side(self):
        rewards = RewardFunctions([length, redness])(PROMPTS, IMAGES)
        assert rewards.dtype == torch.float32 and rewards.device.type == "cpu"
        assert rewards.tolist() == [[1, 10], [2, 20], [3, 30]]

    def test_a_single_function_needs_no_list(self):
        assert RewardFunctions(length)(PROMPTS, IMAGES).tolist() == [[1], [2], [3]]

    def test_passes_columns_on(self):
        def target(prompts, images, *, scene, **columns):
            assert columns == {"other": [1, 2, 3]}
            return scene

        functions = RewardFunctions(target)
        assert functions(PROMPTS, IMAGES, scene=[3.0, 4.0, 5.0], other=[1, 2, 3]).tolist() == [[3], [4], [5]]

    def test_a_function_cannot_harm_the_next_one(self):
        def greedy(prompts, images, **columns):
            prompts.clear()
            images.clear()
            columns["scene"].clear()
            return [0.0, 0.0, 0.0]

        def count(prompts, images, scene):
            return [len(prompts), len(images), len(scene)]

        assert RewardFunctions([greedy, count])(PROMPTS, IMAGES, scene=[1, 2, 3])[:, 1].tolist() == [3, 3, 3]

    @pytest.mark.parametrize(
        "value",
        [
            [1, 2.5, -3],
            (1, 2.5, -3),
            np.array([1, 2.5, -3]),
            [np.float32(1), np.float16(2.5), np.int64(-3)],
            torch.tensor([1, 2.5, -3], dtype=torch.bfloat16, requires_grad=True),
            [torch.tensor(1), torch.tensor(2.5), torch.tensor(-3.0)],
        ],
        ids=["list", "tuple", "numpy", "numpy-scalars", "tensor", "tensor-scalars"],
    )
    def test_takes_what_holds_numbers(self, value):
        rewards = RewardFunctions(returning(value))(PROMPTS, IMAGES)
        assert rewards.tolist() == [[1], [2.5], [-3]]
        assert not rewards.requires_grad

    def test_truth_values_are_numbers(self):
        for value in ([True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])):
            assert RewardFunctions(returning(value))(PROMPTS, IMAGES).flatten().tolist() == [1, 0, 1]

    def test_none_is_no_opinion(self):
        rewards = RewardFunctions([returning([None, 1.0, None]), length])(PROMPTS, IMAGES)
        assert rewards.isnan().tolist() == [[True, False], [False, False], [True, False]]


class TestErrors:
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ([1.0, 2.0], "2 rewards for 3 images"),
            ([1.0] * 4, "4 rewards for 3 images"),
            ([1.0, math.nan, 2.0], "nan for image 1.*`None`"),
            ([1.0, 2.0, math.inf], "inf for image 2"),
            ([1.0, 1e39, 2.0], "1e.39 for image 1.*float32"),
            (np.array([1.0, 2.0, np.nan]), "nan for image 2"),
            (torch.tensor([-math.inf, 0.0, 0.0]), "-inf for image 0"),
            (["1", 2.0, 3.0], "'1' of type `str` for image 0.*Python float"),
            ([[1.0], [2.0], [3.0]], "of type `list` for image 0"),
            (torch.zeros(3, 1), r"shape \(3, 1\).*\(3,\)"),
            (np.zeros((3, 2)), r"shape \(3, 2\)"),
            (torch.zeros(3, device="meta"), r"device meta.*rewards\.cpu\(\)"),
            ([torch.zeros((), device="meta")] * 3, "device meta for image 0.*Python float"),
            (None, "None of type `NoneType`.*list"),
            (1.0, "1.0 of type `float`"),
            ("abc", "'abc' of type `str`"),
            ({"a": 1}, "of type `dict`"),
            ((number for number in range(3)), "of type `generator`"),
            ([1.0, 2j, 3.0], "2j of type `complex` for image 1"),
        ],
    )
    def test_names_the_function_the_value_and_the_way_out(self, value, words):
        with pytest.raises(ValueError, match=f"(?s)Reward function `reward_2`.*{words}"):
            RewardFunctions([returning([1, 2, 3]), returning(value)])(PROMPTS, IMAGES)

    def test_errors_of_the_function_itself_are_passed_on(self):
        def broken(prompts, images):
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            RewardFunctions(broken)(PROMPTS, IMAGES)

    def test_at_the_start(self):
        with pytest.raises(ValueError, match="`reward_funcs` is empty"):
            RewardFunctions([])
        with pytest.raises(TypeError, match="'org/model', which cannot be called"):
            RewardFunctions(["org/model"])
        with pytest.raises(ValueError, match=r"`reward_weights` is \[1.0\] and there are 2 reward functions"):
            RewardFunctions([length, redness], [1.0])
        with pytest.raises(ValueError, match=r"nan.*finite"):
            RewardFunctions([length], [math.nan])

    def test_columns(self):
        def needs_scene(prompts, images, scene, **columns):
            return [0.0] * len(images)

        def takes_nothing_else(prompts, images):
            return [0.0] * len(images)

        RewardFunctions([needs_scene, length, Judge(), functools.partial(length)]).check_columns(["scene", "id"])
        with pytest.raises(ValueError, match=r"`needs_scene\(.*\['id'\].*missing a required argument: 'scene'"):
            RewardFunctions(needs_scene).check_columns(["id"])
        with pytest.raises(ValueError, match=r"`takes_nothing_else\(.*'id'.*\*\*columns"):
            RewardFunctions(takes_nothing_else).check_columns(["id"])
        with pytest.raises(ValueError, match="column 'images'"):
            RewardFunctions(length).check_columns(["images"])


def test_names_are_distinct_and_those_of_the_functions():
    length_2 = returning([])
    length_2.__name__ = "length_2"
    functions = [length, Judge(), length, functools.partial(length), length_2]
    assert RewardFunctions(functions).names == ["length", "Judge", "length_3", "length_4", "length_2"]


class TestCombine:
    def test_is_the_weighted_sum_of_those_with_an_opinion(self):
        functions = RewardFunctions([length, redness], [2.0, -0.5])
        rewards = torch.tensor([[1.0, 10.0], [math.nan, 4.0], [3.0, math.nan], [math.nan, math.nan]])
        combined = functions.combine(rewards)
        assert combined[:3].tolist() == [-3.0, -2.0, 6.0]
        assert combined[3].isnan()

    def test_weights_are_one_by_default(self):
        assert RewardFunctions([length, redness]).combine(torch.tensor([[1.0, 10.0]])).tolist() == [11.0]


def test_metrics_are_those_of_numpy_without_the_missing():
    functions = RewardFunctions([length, redness], [1.0, 0.1])
    rewards = torch.tensor([[1.0, 10.0], [math.nan, 4.0], [3.0, math.nan], [5.0, 7.5]])
    metrics = reward_metrics(rewards, functions)
    values, combined = rewards.double().numpy(), np.array([2.0, 0.4, 3.0, 5.75])
    for index, name in enumerate(["length", "redness"]):
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(np.nanmean(values[:, index]))
        assert metrics[f"rewards/{name}/std"] == pytest.approx(np.nanstd(values[:, index], ddof=1))
        assert metrics[f"rewards/{name}/frac_none"] == 0.25
    assert metrics["reward"] == pytest.approx(combined.mean())
    assert metrics["reward_std"] == pytest.approx(combined.std(ddof=1))


def test_metrics_hold_no_nan():
    functions = RewardFunctions([length, redness])
    metrics = reward_metrics(torch.tensor([[math.nan, 2.0]]), functions)
    assert metrics == {
        "reward": 2.0,
        "reward_std": 0.0,
        "rewards/length/frac_none": 1.0,
        "rewards/redness/mean": 2.0,
        "rewards/redness/std": 0.0,
        "rewards/redness/frac_none": 0.0,
    }
