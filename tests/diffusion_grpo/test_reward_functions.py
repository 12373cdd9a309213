"""Oracles: NumPy's statistics, and the message a user would need."""

import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from trl_spatial.diffusion_grpo.reward_functions import RewardFunctions, reward_metrics


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

    def test_a_function_cannot_harm_the_next_one_nor_the_caller(self):
        images = [Image.effect_noise((16, 16), 50 + index).convert("RGB") for index in range(3)]
        scene = {"objects": ["cube"], "picture": images[0].copy()}
        columns = {"scene": [scene] * 3, "number": [1, 2, 3]}  # one object for all images of a prompt

        def careless(prompts, images, scene, number):
            images[0].thumbnail((4, 4))
            images[1].paste((0, 0, 0), (0, 0, 16, 16))
            scene[0]["objects"].clear()
            scene[0]["picture"].putpixel((0, 0), (1, 2, 3))
            assert scene[1]["objects"] == ["cube"]  # nor another image's value
            for values in (prompts, images, scene, number):
                values.clear()
            return [0.0, 0.0, 0.0]

        def see(prompts, images, scene, number):
            seen.append(
                [
                    prompts,
                    [i.tobytes() for i in images],
                    [[s["objects"], s["picture"].tobytes()] for s in scene],
                    number,
                ]
            )
            return [0.0] * len(images)

        seen = []
        RewardFunctions(see)(PROMPTS, images, **columns)
        RewardFunctions([careless, see])(PROMPTS, images, **columns)
        RewardFunctions(see)(PROMPTS, images, **columns)
        assert seen[0] == seen[1] == seen[2] and len(seen[0][0]) == 3

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

        with pytest.raises(ZeroDivisionError, match="mine") as raised:
            RewardFunctions([returning([1, 2, 3]), broken])(PROMPTS, IMAGES)
        assert raised.value.__notes__ == ["The reward function `broken` raised this error."]

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


def test_metrics_are_those_of_numpy_without_the_missing():
    rewards = torch.tensor([[1.0, 10.0], [math.nan, 4.0], [3.0, math.nan], [5.0, 7.5]])
    combined = torch.tensor([2.0, math.nan, 0.5, 5.75])
    metrics = reward_metrics(rewards, combined, ["length", "redness"])
    values = torch.cat([combined[:, None], rewards], dim=1).double().numpy()
    names = [("reward", "reward_std")] + [(f"rewards/{n}/mean", f"rewards/{n}/std") for n in ("length", "redness")]
    for column, (mean, std) in zip(values.T, names, strict=True):
        assert metrics[mean] == pytest.approx(np.nanmean(column))
        assert metrics[std] == pytest.approx(np.nanstd(column, ddof=1))
    assert metrics["rewards/length/frac_none"] == metrics["rewards/redness/frac_none"] == 0.25


def test_metrics_hold_no_nan():
    metrics = reward_metrics(torch.tensor([[math.nan, 2.0]]), torch.tensor([2.0]), ["length", "redness"])
    assert metrics == {
        "reward": 2.0,
        "reward_std": 0.0,
        "rewards/length/frac_none": 1.0,
        "rewards/redness/mean": 2.0,
        "rewards/redness/std": 0.0,
        "rewards/redness/frac_none": 0.0,
    }
