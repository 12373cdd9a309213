"""Oracles: adaptive integration by scipy, TRL's formula, limits, symmetries and the law of large numbers."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.special import expit, log_expit

from trl_spatial.gaussian_reward.losses import gaussian_bradley_terry_loss, preference_probability


OBJECTIVES = ["expected_nll", "marginal_nll"]
ESTIMATORS = ["closed_form", "monte_carlo"]
MEANS = [0.0, *(sign * mean for mean in (0.1, 1.0, 3.0, 5.3, 10.0, 20.0, 40.0) for sign in (-1, 1))]
STDS = [(1e-3, 1e-3), (0.1, 0.03), (0.5, 1.0), (2.0, 3.0), (1e-3, 6.3), (10.0, 5.0), (20.0, 20.0)]
GRID = list(itertools.product(MEANS, STDS))


def expectation(function, mean, std):
    """`E[function(z)]` of a positive function with its bend at 0 and tails no steeper than `exp(-abs(z))`."""
    spread = {mean + sign * width * std for width in (0, 1, 3, 8, 14) for sign in (-1, 1)}
    modes = {mean + std**2, mean - std**2}  # of exp(z) and exp(-z) times the density
    edges = sorted(z for z in spread | modes | {-30.0, -5.0, 0.0, 5.0, 30.0} if abs(z - mean) <= 14 * std)
    return math.fsum(
        quad(lambda x: function(mean + std * x) * math.exp(-(x**2) / 2), a, b, epsabs=0, epsrel=1e-12)[0]
        for a, b in itertools.pairwise((z - mean) / std for z in edges)
    ) / math.sqrt(2 * math.pi)


@functools.cache
def integrals(objective, mean, chosen_std, rejected_std):
    """Loss and its derivatives by the four arguments; those of the std by Stein's lemma, not by differentiation."""
    std = math.hypot(chosen_std, rejected_std)
    slope = expectation(lambda z: expit(z) * expit(-z), mean, std)
    if objective == "expected_nll":
        loss = expectation(lambda z: -log_expit(z), mean, std)
        by_mean, by_variance = -expectation(lambda z: expit(-z), mean, std), slope
    else:
        chosen, rejected = expectation(expit, mean, std), expectation(lambda z: expit(-z), mean, std)
        loss = -math.log1p(-rejected) if rejected < 0.5 else -math.log(chosen)
        # the curvature of the sigmoid is odd: keep its two signs apart
        convex = expectation(lambda z: expit(z) * expit(-z) * abs(math.tanh(z / 2)) * (z < 0), mean, std)
        concave = expectation(lambda z: expit(z) * expit(-z) * abs(math.tanh(z / 2)) * (z > 0), mean, std)
        by_mean, by_variance = -slope / chosen, (concave - convex) / chosen
    return loss, by_mean, by_variance * chosen_std**2, -by_mean, by_variance * rejected_std**2


def pairs(means, stds, dtype, requires_grad=False):
    """Arguments of the loss for differences `means` of rewards with the given pairs of stds."""
    chosen_log_std, rejected_log_std = torch.tensor(stds, dtype=torch.float64).log().to(dtype).unbind(1)
    mean = torch.tensor(means, dtype=dtype)
    args = [mean, chosen_log_std, torch.zeros_like(mean), rejected_log_std]
    return [arg.clone().requires_grad_(requires_grad) for arg in args]


class TestClosedForm:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_the_integral(self, objective, dtype, tolerance):
        args = pairs(*zip(*GRID, strict=True), dtype, requires_grad=True)
        loss = gaussian_bradley_terry_loss(*args, objective=objective)
        ours = torch.stack([loss, *torch.autograd.grad(loss.sum(), args)]).double()  # (5, num_cases)
        truth = torch.tensor([integrals(objective, mean, *stds) for mean, stds in GRID], dtype=torch.float64).T
        error = (ours - truth).abs()
        assert loss.dtype == dtype
        assert (error[:, args[0].abs() <= 10] <= tolerance).all()
        # at 0 the marginal form's std derivative is 0 by symmetry: a relative error means nothing there
        assert (error <= 1e-3 * truth.abs())[:, args[0] != 0].all()
        assert (error[0] <= 1e-3 * truth[0]).all()

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_gradient_is_that_of_the_value(self, objective):
        args = pairs([-12.0, -0.3, 0.0, 2.0, 15.0], [(0.01, 2.0), (0.5, 0.5), (1.0, 3.0), (20.0, 20.0), (4.0, 0.1)],
                     torch.float64, requires_grad=True)  # fmt: skip
        margin = torch.full_like(args[0], 0.5, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *inputs: gaussian_bradley_terry_loss(*inputs[:4], objective=objective, margin=inputs[4]),
            (*args, margin),
        )

    def test_uncertainty_costs_by_one_objective_and_not_more_by_the_other(self):
        # Jensen: softplus is convex, and so is -log
        args = pairs(*zip(*GRID, strict=True), torch.float64)
        expected = gaussian_bradley_terry_loss(*args)
        certain = -F.logsigmoid(args[0])
        assert (expected >= certain * (1 - 1e-12)).all()
        assert (expected >= gaussian_bradley_terry_loss(*args, objective="marginal_nll") * (1 - 1e-12)).all()

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_a_pair_does_not_depend_on_its_batch(self, objective):
        args = pairs(*zip(*GRID, strict=True), torch.float32)
        loss = gaussian_bradley_terry_loss(*args, objective=objective)
        alone = [gaussian_bradley_terry_loss(*(arg[i : i + 1] for arg in args), objective=objective) for i in range(9)]
        torch.testing.assert_close(loss[:9], torch.cat(alone), rtol=1e-6, atol=0)


class TestMonteCarlo:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (3.0, 2.0), (-8.0, 4.0), (-2.0, 0.1)])
    def test_converges_to_the_closed_form(self, objective, mean, std):
        args = pairs([mean] * 500, [(std, std)] * 500, torch.float64, requires_grad=True)
        generator = torch.Generator().manual_seed(0)
        sampled = gaussian_bradley_terry_loss(*args, objective=objective, estimator="monte_carlo", generator=generator)
        exact = gaussian_bradley_terry_loss(*args, objective=objective)
        for ours, truth in zip(
            [sampled, *torch.autograd.grad(sampled.sum(), args)],
            [exact, *torch.autograd.grad(exact.sum(), args)],
            strict=True,
        ):
            # the bias of the logarithm is half the squared relative error of 1000 samples
            bias = 0.01 * truth.abs().max() * (objective == "marginal_nll") + 1e-12
            assert (ours.mean() - truth.mean()).abs() <= 5 * ours.std() / math.sqrt(500) + bias

    @pytest.mark.parametrize("num_samples", [1, 2, 3])
    def test_expected_nll_is_unbiased_with_few_samples(self, num_samples):
        args = pairs([-1.0] * 100_000, [(1.0, 2.0)] * 100_000, torch.float64)
        loss = gaussian_bradley_terry_loss(
            *args, estimator="monte_carlo", num_samples=num_samples, generator=torch.Generator().manual_seed(0)
        )
        exact = gaussian_bradley_terry_loss(*(arg[:1] for arg in args))
        assert abs(loss.mean() - exact) <= 4 * loss.std() / math.sqrt(100_000)

    @pytest.mark.parametrize("mean", [0.0, -2.0])
    def test_gradient_of_a_small_std_has_the_right_sign(self, mean):
        # independent samples get it wrong for 5 % and 35 % of the pairs
        args = pairs([mean] * 1000, [(0.07, 0.07)] * 1000, torch.float32, requires_grad=True)
        loss = gaussian_bradley_terry_loss(*args, estimator="monte_carlo", generator=torch.Generator().manual_seed(0))
        assert (torch.autograd.grad(loss.sum(), args[1])[0] > 0).all()

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_is_drawn_from_the_generator(self, objective):
        args = pairs([1.0] * 4, [(1.0, 1.0)] * 4, torch.float32)
        sample = functools.partial(
            gaussian_bradley_terry_loss, *args, objective=objective, estimator="monte_carlo", num_samples=10
        )
        first = sample(generator=torch.Generator().manual_seed(0))
        assert torch.equal(first, sample(generator=torch.Generator().manual_seed(0)))
        assert not torch.equal(first, sample(generator=torch.Generator().manual_seed(1)))
        assert len(first.unique()) == 4  # every pair has its own noise


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
class TestBothEstimators:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_trl_loss_without_uncertainty(self, objective, estimator, dtype):
        chosen, rejected, margin = (
            torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) * torch.tensor([[10.0], [10.0], [1.0]])
        ).to(dtype)
        trl = -F.logsigmoid(chosen - rejected - margin)
        kwargs = {"objective": objective, "estimator": estimator, "margin": margin}
        log_std = torch.full_like(chosen, -40.0)
        assert torch.equal(gaussian_bradley_terry_loss(chosen, log_std, rejected, log_std, **kwargs), trl)
        log_std = torch.full_like(chosen, -20.0)
        loss = gaussian_bradley_terry_loss(chosen, log_std, rejected, log_std, **kwargs)
        torch.testing.assert_close(loss, trl, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_inputs_have_finite_gradients(self, objective, estimator, dtype):
        cases = itertools.product([-1e4, -40.0, 0.0, 40.0, 1e4], [-20.0, 0.0, 20.0], [-20.0, 0.0, 20.0])
        mean, chosen_log_std, rejected_log_std = (torch.tensor(v, dtype=dtype) for v in zip(*cases, strict=True))
        args = [mean / 2, chosen_log_std, -mean / 2, rejected_log_std]
        args = [arg.requires_grad_() for arg in args]
        loss = gaussian_bradley_terry_loss(*args, objective=objective, estimator=estimator)
        assert torch.stack([loss, *torch.autograd.grad(loss.sum(), args)]).isfinite().all()
        assert (loss >= 0).all()

    def test_half_precision_is_raised_to_float32(self, objective, estimator):
        args = pairs([-3.0, 0.5, 7.0], [(0.1, 1.0), (2.0, 2.0), (0.5, 4.0)], torch.bfloat16)
        kwargs = {"objective": objective, "estimator": estimator}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = gaussian_bradley_terry_loss(*args, **kwargs, generator=torch.Generator().manual_seed(0))
        raised = [arg.float() for arg in args]
        expected = gaussian_bradley_terry_loss(*raised, **kwargs, generator=torch.Generator().manual_seed(0))
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)


class TestPreferenceProbability:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7)])
    def test_swapping_the_pair_gives_the_complement(self, dtype, tolerance):
        chosen_mean, chosen_log_std, rejected_mean, rejected_log_std = pairs(*zip(*GRID, strict=True), dtype)
        probability = preference_probability(chosen_mean, chosen_log_std, rejected_mean, rejected_log_std)
        swapped = preference_probability(rejected_mean, rejected_log_std, chosen_mean, chosen_log_std)
        torch.testing.assert_close(swapped, 1 - probability, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_integral(self, dtype):
        probability = preference_probability(*pairs(*zip(*GRID, strict=True), dtype))
        truth = torch.tensor([expectation(expit, mean, math.hypot(*stds)) for mean, stds in GRID], dtype=dtype)
        torch.testing.assert_close(probability, truth, rtol=1e-5, atol=0)

    def test_uncertainty_draws_it_towards_a_half(self):
        args = pairs([2.0] * 50, [(std, 0.1) for std in torch.logspace(-2, 3, 50).tolist()], torch.float64)
        probability = preference_probability(*args)
        assert (probability.diff() < 0).all()
        assert probability.min() > 0.5


class TestErrors:
    ARGS = (torch.zeros(4),) * 4

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"objective": "nll"}, "'nll': use 'expected_nll' or 'marginal_nll'"),
            ({"estimator": "exact"}, "'exact': use 'closed_form' or 'monte_carlo'"),
            ({"estimator": "monte_carlo", "num_samples": 0}, "num_samples is 0: use at least 1"),
            ({"margin": torch.zeros(4, 1)}, r"margin has shape \(4, 1\) but chosen_mean has shape \(4,\)"),
        ],
    )
    def test_unusable_argument(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            gaussian_bradley_terry_loss(*self.ARGS, **kwargs)

    @pytest.mark.parametrize("function", [gaussian_bradley_terry_loss, preference_probability])
    @pytest.mark.parametrize(
        ("position", "name"), [(1, "chosen_log_std"), (2, "rejected_mean"), (3, "rejected_log_std")]
    )
    def test_shapes_that_would_broadcast(self, function, position, name):
        args = list(self.ARGS)
        args[position] = torch.zeros(4, 1)
        with pytest.raises(ValueError, match=rf"{name} has shape \(4, 1\) but chosen_mean has shape \(4,\)"):
            function(*args)
