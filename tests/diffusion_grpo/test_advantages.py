"""Oracles: the same in numpy, group by group; sorting; invariances."""

import itertools
import math

import numpy as np
import pytest
import torch

from trl_spatial.diffusion_grpo.advantages import combine_rewards, group_advantages, select_top_k


SCALES = ["group", "batch", "none"]
SCOPES = ["kept", "group"]
NAN = math.nan


def random_rewards(num_groups, num_generations, *, nan_share=0.0, seed=0):
    """Rewards of groups that differ in mean and spread."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(rng.normal(5, 3, (num_groups, 1)), rng.uniform(0.1, 2, (num_groups, 1)),
                         (num_groups, num_generations))  # fmt: skip
    rewards[rng.random(rewards.shape) < nan_share] = NAN
    return torch.from_numpy(rewards.astype(np.float32)).flatten()


def advantages_by_numpy(rewards, num_generations, scale_rewards, kept, advantage_scope, clip):
    rewards, kept = rewards.double().numpy(), kept.numpy()
    groups = [np.arange(first, first + num_generations) for first in range(0, len(rewards), num_generations)]
    kept_of = [[i for i in kept if i in group] for group in groups]
    scopes = [rewards[chosen if advantage_scope == "kept" else group]
              for group, chosen in zip(groups, kept_of, strict=True)]  # fmt: skip
    advantages = []
    for scope, chosen in zip(scopes, kept_of, strict=True):
        std = {"group": np.nanstd(scope), "batch": np.nanstd(np.concatenate(scopes)), "none": 1.0}[scale_rewards]
        advantages += [np.clip((rewards[i] - np.nanmean(scope)) / std, -clip, clip) for i in chosen]
    return torch.tensor(np.nan_to_num(advantages), dtype=torch.float32)


class TestSelectTopK:
    @pytest.mark.parametrize(("num_groups", "num_generations", "top_k"), [(1, 2, 1), (3, 24, 6), (5, 7, 3), (2, 8, 4)])
    def test_takes_both_ends_of_every_group(self, num_groups, num_generations, top_k):
        rewards = random_rewards(num_groups, num_generations)
        kept = select_top_k(rewards, num_generations, top_k)
        assert kept.shape == (num_groups * 2 * top_k,)
        assert kept.dtype == torch.int64
        for group, chosen in enumerate(kept.view(num_groups, -1)):
            first = group * num_generations
            of_group = rewards[first : first + num_generations].tolist()
            ranking = sorted(range(num_generations), key=of_group.__getitem__)
            assert chosen.tolist() == sorted(first + i for i in ranking[:top_k] + ranking[-top_k:])

    def test_without_top_k_takes_all(self):
        assert select_top_k(random_rewards(3, 4), 4, None).equal(torch.arange(12))

    def test_ranks_equal_rewards_by_index(self):
        assert select_top_k(torch.ones(6), 6, 2).tolist() == [0, 1, 4, 5]
        assert select_top_k(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]), 6, 2).tolist() == [1, 2, 3, 4]
        # 24 binary rewards: as many indices as asked for, none twice
        binary = (random_rewards(4, 24) > 5).float()
        kept = select_top_k(binary, 24, 6)
        assert len(set(kept.tolist())) == 48

    def test_takes_images_without_a_reward_only_where_others_are_too_few(self):
        for num_opinions in range(9):
            for places in itertools.combinations(range(8), num_opinions):
                rewards = torch.full((8,), NAN)
                rewards[list(places)] = torch.arange(num_opinions).float()
                kept = select_top_k(rewards, 8, 2)
                assert len(set(kept.tolist())) == 4
                of_kept = rewards[kept]
                if num_opinions >= 4:
                    ends = {0.0, 1.0, num_opinions - 2.0, num_opinions - 1.0}
                    assert set(of_kept.tolist()) == ends
                else:
                    assert (~of_kept.isnan()).sum() == num_opinions

    @pytest.mark.parametrize(
        ("num_rewards", "top_k", "message"),
        [
            (24, 13, "top_k is 13 with num_generations=24: use 1 to 12, or None to train on all"),
            (24, 0, "top_k is 0 with num_generations=24"),
            (25, 6, r"rewards has shape \(25,\): with num_generations=24, .* all groups are whole"),
        ],
    )
    def test_of_what_cannot_be_selected_is_an_error(self, num_rewards, top_k, message):
        with pytest.raises(ValueError, match=message):
            select_top_k(torch.zeros(num_rewards), 24, top_k)


class TestGroupAdvantages:
    @pytest.mark.parametrize("nan_share", [0.0, 0.3])
    @pytest.mark.parametrize("top_k", [None, 3])
    @pytest.mark.parametrize("advantage_scope", SCOPES)
    @pytest.mark.parametrize("scale_rewards", SCALES)
    def test_equal_numpys(self, scale_rewards, advantage_scope, top_k, nan_share):
        for seed in range(5):
            rewards = random_rewards(6, 12, nan_share=nan_share, seed=seed)
            kept = select_top_k(rewards, 12, top_k)
            for clip in (0.8, 5.0):
                ours = group_advantages(
                    rewards, 12, scale_rewards, kept=kept, advantage_scope=advantage_scope, clip=clip
                )
                theirs = advantages_by_numpy(rewards, 12, scale_rewards, kept, advantage_scope, clip)
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_orders_of_the_papers_differ(self):
        # Spatial-RL's over the kept have mean square 1; DanceGRPO's over the group are larger, as the ends are kept
        rewards = random_rewards(4, 24)
        kept = select_top_k(rewards, 24, 6)
        over_kept = group_advantages(rewards, 24, kept=kept).view(4, 12)
        over_group = group_advantages(rewards, 24, kept=kept, advantage_scope="group").view(4, 12)
        torch.testing.assert_close(over_kept.square().mean(1), torch.ones(4))
        assert (over_group.square().mean(1) > 1.2).all()
        torch.testing.assert_close(over_group, group_advantages(rewards, 24)[kept].view(4, 12))

    @pytest.mark.parametrize("scale_rewards", SCALES)
    def test_without_kept_are_those_of_all(self, scale_rewards):
        rewards = random_rewards(4, 6)
        all_kept = group_advantages(rewards, 6, scale_rewards, kept=torch.arange(24))
        assert group_advantages(rewards, 6, scale_rewards).equal(all_kept)

    def test_do_not_depend_on_offset_and_scale_of_a_group(self):
        rewards = random_rewards(4, 6)
        scale, offset = torch.tensor([[0.01], [1.0], [30.0], [4000.0]]), torch.tensor([[0.1], [-3.0], [100.0], [0.0]])
        changed = (rewards.view(4, 6) * scale + offset).flatten()
        torch.testing.assert_close(
            group_advantages(changed, 6), group_advantages(rewards, 6), rtol=1e-3, atol=1e-3
        )  # fmt: skip

    def test_divided_by_the_batchs_std_keep_the_spread_between_groups(self):
        rewards = torch.tensor([0.0, 2.0, 10.0, 30.0])
        advantages = group_advantages(rewards, 2, "batch", clip=math.inf)
        torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -10.0, 10.0]) / np.std([0, 2, 10, 30]).item())

    def test_are_clipped(self):
        rewards = torch.zeros(101)
        rewards[7] = 1.0
        assert group_advantages(rewards, 101).max() == 5
        assert group_advantages(rewards, 101, clip=2.0).max() == 2
        assert group_advantages(-rewards, 101, clip=2.0).min() == -2
        assert group_advantages(rewards, 101, clip=math.inf).max() == pytest.approx(10)

    @pytest.mark.parametrize("advantage_scope", SCOPES)
    @pytest.mark.parametrize("scale_rewards", SCALES)
    @pytest.mark.parametrize("value", [0.0, 0.1, -7.81, 1e-6, 1e4, 1e10])
    def test_of_nearly_equal_rewards_are_zero(self, value, scale_rewards, advantage_scope):
        steps = torch.randint(-2, 3, (24,), generator=torch.Generator().manual_seed(0))
        nearly_equal = torch.tensor(value) * (1 + steps * torch.finfo(torch.float32).eps)
        assert value == 0 or nearly_equal.unique().numel() > 1
        for rewards in (torch.full((24,), value), nearly_equal):
            # beside a group with an opinion
            rewards = torch.cat([rewards, random_rewards(1, 24) * max(abs(value), 1.0)])
            kept = select_top_k(rewards, 24, 6)
            advantages = group_advantages(
                rewards, 24, scale_rewards, kept=kept, advantage_scope=advantage_scope, clip=math.inf
            )
            assert (advantages[:12] == 0).all()
            assert (advantages[12:] != 0).all()
            assert advantages.isfinite().all()

    def test_of_rewards_that_are_zero_but_for_rounding_are_zero(self):
        generator = torch.Generator().manual_seed(0)
        rounding = torch.randint(-2, 3, (24,), generator=generator) * torch.finfo(torch.float32).eps * 0.01
        assert group_advantages(rounding, 24).equal(torch.zeros(24))

    @pytest.mark.parametrize("spread", [1e-3, 1e-6])
    def test_of_small_differences_are_not(self, spread):
        # a thousandth of the rewards' size is an opinion, and so is any difference of small rewards
        rewards = spread * random_rewards(1, 8) + (1.0 if spread == 1e-3 else 0.0)
        torch.testing.assert_close(group_advantages(rewards, 8).square().mean(), torch.tensor(1.0))

    def test_without_an_opinion_are_zero_and_leave_the_others_as_they_are(self):
        rewards = torch.tensor([1.0, NAN, 3.0, NAN])
        assert group_advantages(rewards, 4).tolist() == [-1, 0, 1, 0]
        assert group_advantages(torch.tensor([2.0, NAN, NAN, NAN]), 4).equal(torch.zeros(4))
        for scale_rewards in SCALES:
            assert group_advantages(torch.full((4,), NAN), 4, scale_rewards).equal(torch.zeros(4))
            silent = torch.cat([torch.full((4,), NAN), torch.tensor([1.0, 2.0, 3.0, 4.0])])
            alone = group_advantages(silent[4:], 4, scale_rewards)
            assert group_advantages(silent, 4, scale_rewards).equal(torch.cat([torch.zeros(4), alone]))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (dict(scale_rewards="std"), "Unknown scale_rewards 'std': use 'group', 'batch' or 'none'"),
            (dict(advantage_scope="all"), "Unknown advantage_scope 'all': use 'kept' or 'group'"),
            (dict(rewards=torch.zeros(10)), r"rewards has shape \(10,\): with num_generations=4"),
            (dict(rewards=torch.zeros(8, 2)), r"rewards has shape \(8, 2\)"),
            (dict(kept=torch.tensor([0, 1, 4])), "equally many images of each of the 2 groups"),
            (dict(kept=torch.tensor([0, 1, 2, 4])), "equally many images of each of the 2 groups"),
            (dict(kept=torch.tensor([0, 4, 1, 5])), "group by group"),
        ],
    )
    def test_of_anything_else_is_an_error(self, changed, message):
        arguments = dict(rewards=torch.arange(8.0), num_generations=4) | changed
        with pytest.raises(ValueError, match=message):
            group_advantages(**arguments)


class TestCombineRewards:
    REWARDS = torch.tensor(
        [[1.0, 10.0], [3.0, NAN], [NAN, NAN], [2.0, 40.0], [5.0, 7.0], [5.0, 8.0], [5.0, 9.0], [5.0, 9.0]]
    )

    def test_sums_the_rewards_by_weight(self):
        combined = combine_rewards(self.REWARDS, 4, [2.0, 0.1])
        # images 1 and 2 lack what the others of their group have
        expected = torch.tensor([3.0, NAN, NAN, 8.0, 10.7, 10.8, 10.9, 10.9])
        torch.testing.assert_close(combined, expected, equal_nan=True)
        assert combined.dtype == torch.float32
        # a function of weight 0 may be missing
        of_one = combine_rewards(self.REWARDS, 4, [1.0, 0.0])
        torch.testing.assert_close(of_one, self.REWARDS[:, 0], equal_nan=True)

    def test_sums_normalized_rewards_by_weight(self):
        combined = combine_rewards(self.REWARDS, 4, [2.0, 0.5], "normalize_then_sum")
        second = np.array([7.0, 8.0, 9.0, 9.0])
        expected = [
            *(-2.5, NAN, NAN, 2.5),  # of two images, each is one standard deviation from the mean
            # the first function gives all of the second group the same: no part of the sum
            *(0.5 * (second - second.mean()) / second.std()),
        ]
        torch.testing.assert_close(combined, torch.tensor(expected, dtype=torch.float32), equal_nan=True)

    def test_a_function_that_a_whole_group_lacks_counts_as_its_mean(self):
        rewards = torch.tensor([[1.0, 4.0], [2.0, 8.0], [3.0, NAN], [5.0, NAN], [NAN, NAN], [NAN, NAN]])
        combined = combine_rewards(rewards, 2, [1.0, 0.5])
        torch.testing.assert_close(combined, torch.tensor([3.0, 6.0, 6.0, 8.0, NAN, NAN]), equal_nan=True)
        # one that gave no reward at all is left out
        alone = combine_rewards(torch.tensor([[1.0, NAN], [2.0, NAN]]), 2)
        assert alone.tolist() == [1.0, 2.0]

    @pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    def test_a_constant_added_to_a_function_changes_no_advantage(self, how, scale_rewards):
        generator = torch.Generator().manual_seed(0)
        rewards = torch.randn(6 * 8, 3, generator=generator, dtype=torch.float64)
        rewards[torch.rand(rewards.shape, generator=generator) < 0.15] = NAN
        rewards[8:16, 1] = rewards[24:32, 0] = NAN  # whole groups
        rewards[32:40] = NAN

        def advantages(rewards):
            combined = combine_rewards(rewards, 8, [1.0, -2.0, 0.5], how)
            return group_advantages(combined, 8, scale_rewards, clip=math.inf)

        expected = advantages(rewards)
        assert expected.abs().max() > 0.5
        for shift in ([5.0, 0.0, 0.0], [0.0, -7.0, 3.0]):
            torch.testing.assert_close(advantages(rewards + torch.tensor(shift)), expected, rtol=0, atol=1e-4)
        # images that lack a reward which others of their group have, and groups without any, are not learned from
        known = ~rewards.isnan()
        is_expected = known | ~known.view(6, 8, 3).any(1).repeat_interleave(8, 0)
        assert (expected[~is_expected.all(1)] == 0).all() and (expected[32:40] == 0).all()
        # and change nothing for the others
        changed = torch.where(is_expected.all(1, keepdim=True), rewards, torch.where(known, 100.0, NAN))
        torch.testing.assert_close(advantages(changed), expected, rtol=0, atol=1e-4)
        # what is better by every function is better
        better = rewards.clone()
        better[0], better[1] = torch.tensor([9.0, -9.0, 9.0]), torch.tensor([8.0, -8.0, 8.0])
        first, second, *others = advantages(better)[:8].tolist()
        assert first > second > max(others)

    def test_a_sum_beyond_float32_is_an_error(self):
        with pytest.raises(ValueError, match="exceeds the range of float32"):
            combine_rewards(torch.tensor([[3e38, 3e38], [1.0, 1.0]]), 2)

    def test_normalized_first_no_function_drowns_another(self):
        small, large = random_rewards(3, 24, seed=1), 1000 * random_rewards(3, 24, seed=2)
        rewards = torch.stack([small, large], dim=1)
        advantages = {
            how: group_advantages(combine_rewards(rewards, 24, multi_objective_aggregation=how), 24)
            for how in ("sum_then_normalize", "normalize_then_sum")
        }

        def correlations(of_one):
            of_one = group_advantages(of_one, 24)
            return [(advantages[how] * of_one).mean().item() for how in advantages]

        drowned, heard = correlations(small)
        assert abs(drowned) < 0.3 < 0.5 < heard
        assert all(correlation > 0.5 for correlation in correlations(large))
        # scaling one function changes nothing
        changed = torch.stack([small, 7 * large + 3], dim=1)
        torch.testing.assert_close(
            combine_rewards(changed, 24, multi_objective_aggregation="normalize_then_sum"),
            combine_rewards(rewards, 24, multi_objective_aggregation="normalize_then_sum"),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip

    def test_of_one_function_leaves_its_order(self):
        rewards = random_rewards(3, 8, nan_share=0.2)
        for how in ("sum_then_normalize", "normalize_then_sum"):
            combined = combine_rewards(rewards[:, None], 8, multi_objective_aggregation=how)
            assert select_top_k(combined, 8, 2).equal(select_top_k(rewards, 8, 2))
            torch.testing.assert_close(group_advantages(combined, 8), group_advantages(rewards, 8))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((4, [1.0]), "1 reward weights for 2 reward functions"),
            ((4, None, "sum"), "Unknown multi_objective_aggregation 'sum': use 'sum_then_normalize' or"),
            ((3, None, "normalize_then_sum"), "with num_generations=3"),
        ],
    )
    def test_of_anything_else_is_an_error(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            combine_rewards(self.REWARDS, *arguments)
