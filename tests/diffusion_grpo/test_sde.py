"""Oracles: diffusers' scheduler, the papers' formulas in float64, the law of Gaussian data, torch.distributions, and the
reference values of the field's schedules."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_spatial.diffusion_grpo.sde import DYNAMICS, sde_step, sde_window


# σ at which steps are tested against formulas, and a noise level each of the dynamics is used with
STEPS = [(0.98, 0.95), (0.9037, 0.7897), (0.5, 0.25), (0.2730, 0.1), (0.0089, 0.004)]
NOISE_LEVELS = {"flow_sde": 0.9, "dance_sde": 0.3, "cps": 0.8, "precise": 1.5}
# sigmas, noise level of Flow-SDE, std of its steps
SCHEDULES = {
    ("flux", 6): (
        [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0],
        0.9,
        [0.9, 0.9312, 0.6460, 0.5059, 0.4008],
    ),
    ("flux", 10): (
        [1, 0.9441, 0.8825, 0.8142, 0.7380, 0.6525, 0.5559, 0.4459, 0.3195, 0.1726, 0],
        0.7,
        [0.7, 0.7144, 0.5015, 0.4044, 0.3435, 0.2981, 0.2598, 0.2233, 0.1838],
    ),
    ("sd3", 10): ([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0], 0.7, None),
}


def make_scheduler(family, num_inference_steps):
    if family == "sd3":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)  # 1024 tokens at 512²
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist(), mu=mu)
    return scheduler


def random_step(shape=(3, 16, 8), seed=0):
    """Velocity and latents of as many images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator).unbind(0)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mean_and_std(velocity, latents, t, t_next, a, dynamics):
    """The papers' formulas by the score and by the predicted image and noise, in float64."""
    x, v, h = latents.double(), velocity.double(), t - t_next
    image, noise = x - t * v, x + (1 - t) * v
    if dynamics == "cps":
        angle = a * math.pi / 2
        return (1 - t_next) * image + t_next * math.cos(angle) * noise, t_next * math.sin(angle)
    if dynamics == "precise":
        std = t_next * math.sqrt(1 - (t_next * (1 - t) / (t * (1 - t_next))) ** (a**2))
        return (1 - t_next) * image + math.sqrt(t_next**2 - std**2) * noise, std
    g = a * math.sqrt(t / (1 - t)) if dynamics == "flow_sde" else a
    score = -noise / t
    return x - h * (v - g**2 / 2 * score), g * math.sqrt(h)


class TestMeanAndStd:
    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize(("t", "t_next"), STEPS)
    def test_are_those_of_the_paper(self, dynamics, t, t_next):
        velocity, latents = random_step()
        for a in (0.1, 0.5, NOISE_LEVELS[dynamics], 1.0):
            output = sde_step(velocity, latents, t, t_next, a, dynamics=dynamics)
            mean, std = mean_and_std(velocity, latents, t, t_next, a, dynamics)
            torch.testing.assert_close(output.mean, mean.float(), rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(output.std, torch.full((3,), std), rtol=2e-6, atol=0)

    @pytest.mark.parametrize(("t", "t_next"), STEPS)
    def test_derivative_by_the_velocity(self, t, t_next):
        h, a = t - t_next, 0.9
        for dynamics, expected in {
            "flow_sde": -h * (1 + a**2 / 2),
            "dance_sde": -h * (1 + a**2 * (1 - t) / (2 * t)),
        }.items():
            velocity, latents = random_step()
            velocity.requires_grad_()
            sde_step(velocity, latents, t, t_next, a, dynamics=dynamics).mean.sum().backward()
            torch.testing.assert_close(velocity.grad, torch.full_like(latents, expected), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 1.0])
    @pytest.mark.parametrize("dynamics", ["cps", "precise"])
    def test_leave_the_noise_that_the_next_sigma_says(self, dynamics, a):
        noise, image = random_step()
        for t, t_next in pairwise([1, *sorted({t for step in STEPS for t in step}, reverse=True), 0]):
            latents = (1 - t) * image + t * noise
            output = sde_step(noise - image, latents, t, t_next, a, dynamics=dynamics)
            remaining = output.mean - (1 - t_next) * image  # a multiple of the noise
            coefficient = (remaining * noise).sum() / noise.square().sum()
            torch.testing.assert_close(remaining, coefficient * noise, rtol=0, atol=2e-6)
            assert math.hypot(coefficient, output.std[0]) == pytest.approx(t_next, abs=1e-6)

    @pytest.mark.parametrize("dynamics", ["cps", "precise"])
    @pytest.mark.parametrize("t", [1.0, 0.3])
    def test_end_with_a_deterministic_step_by_themselves(self, dynamics, t):
        velocity, latents = random_step()
        output = sde_step(velocity, latents, t, 0.0, 0.8, dynamics=dynamics)
        torch.testing.assert_close(output.next_latents, latents - t * velocity)

    @pytest.mark.parametrize("a", [0.1, 1.5])
    def test_precise_draws_all_noise_anew_in_the_first_step(self, a):
        velocity, latents = random_step()
        output = sde_step(velocity, latents, 1.0, 0.9, a, dynamics="precise", generator=generators(1, 2, 3))
        torch.testing.assert_close(output.mean, 0.1 * (latents - velocity))  # nothing of the predicted noise
        assert output.std.equal(torch.full((3,), 0.9))
        assert output.log_probs.isfinite().all()

    def test_precise_is_flow_sde_in_the_limit_of_small_steps(self):
        velocity, latents = random_step()
        for t in (0.98, 0.5, 0.05):
            precise, flow_sde = (
                sde_step(velocity, latents, t, t - 1e-4 * t * (1 - t), 0.9, dynamics=dynamics)
                for dynamics in ("precise", "flow_sde")
            )
            moved = flow_sde.mean - latents
            torch.testing.assert_close(precise.mean - latents, moved, rtol=0, atol=2e-3 * moved.abs().max().item())
            torch.testing.assert_close(precise.std, flow_sde.std, rtol=1e-3, atol=0)

    def test_precise_steps_with_one_predicted_image_are_one_step(self):
        latents, image = random_step()
        noise_kept, variance = latents.clone(), 0.0
        sigmas = (0.9, 0.7, 0.65, 0.2)
        for t, t_next in pairwise(sigmas):
            output = sde_step((noise_kept - image) / t, noise_kept, t, t_next, 1.5, dynamics="precise")
            # the mean of what follows, and the variance that its noise leaves in it
            carried = math.sqrt(1 - (output.std[0] / t_next) ** 2) * t_next / t
            noise_kept, variance = output.mean, variance * carried**2 + output.std[0] ** 2
        once = sde_step((latents - image) / 0.9, latents, 0.9, 0.2, 1.5, dynamics="precise")
        torch.testing.assert_close(noise_kept, once.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance.sqrt(), once.std[0])

    def test_dance_sde_is_finite_at_the_first_step(self):
        velocity, latents = random_step()
        output = sde_step(velocity, latents, 1.0, 0.9, 0.3, dynamics="dance_sde")
        torch.testing.assert_close(output.mean, latents - 0.1 * (velocity + 0.045 * latents))
        torch.testing.assert_close(output.std, torch.full((3,), 0.3 * math.sqrt(0.1)))

    def test_each_image_has_its_own_sigmas(self):
        velocity, latents = random_step()
        sigma, sigma_next = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.7, 0.4, 0.1])
        together = sde_step(velocity, latents, sigma, sigma_next, 0.7, generator=generators(1, 2, 3))
        for i, generator in enumerate(generators(1, 2, 3)):
            alone = sde_step(velocity[i, None], latents[i, None], sigma[i], sigma_next[i], 0.7, generator=generator)
            assert alone.next_latents.equal(together.next_latents[i, None])
            assert alone.std.equal(together.std[i, None])
            torch.testing.assert_close(alone.log_probs, together.log_probs[i, None], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    def test_a_number_is_read_as_if_from_a_schedule(self, dynamics):
        velocity, latents = random_step()
        as_numbers = sde_step(velocity, latents, 0.9, 0.83, 0.7, dynamics=dynamics, generator=generators(1, 2, 3))
        as_tensors = sde_step(velocity, latents, torch.tensor(0.9), torch.tensor([0.83] * 3), 0.7, dynamics=dynamics,
                              next_latents=as_numbers.next_latents)  # fmt: skip
        for name, tensor in vars(as_numbers).items():
            assert getattr(as_tensors, name).equal(tensor)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_mathematics_is_float32(self, dtype):
        velocity, latents = (tensor.to(dtype) for tensor in random_step())
        output = sde_step(velocity, latents, 0.9, 0.8, 0.7, generator=generators(1, 2, 3))
        in_float32 = sde_step(velocity.float(), latents.float(), 0.9, 0.8, 0.7, generator=generators(1, 2, 3))
        for name, tensor in vars(output).items():
            assert tensor.dtype == torch.float32
            assert tensor.equal(getattr(in_float32, name))


class TestSchedules:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_std_of_flow_sde(self, schedule):
        expected_sigmas, noise_level, expected_stds = SCHEDULES[schedule]
        sigmas = make_scheduler(*schedule).sigmas
        torch.testing.assert_close(sigmas, torch.tensor(expected_sigmas), rtol=0, atol=6e-5)
        velocity, latents = random_step((1, 4, 4))
        stds = [
            sde_step(velocity, latents, *step, noise_level, sigma_max=sigmas[1] if i == 0 else None).std.item()
            for i, step in enumerate(pairwise(sigmas[:-1]))
        ]
        if expected_stds is not None:
            assert stds == pytest.approx(expected_stds, abs=6e-5)

    @pytest.mark.parametrize("sigma_max", [0.5, 0.9037, 0.9441, 0.9999])
    @pytest.mark.parametrize("noise_level", [0.3, 0.9, 1.2])
    def test_std_of_the_first_flow_sde_step_is_the_noise_level(self, sigma_max, noise_level):
        velocity, latents = random_step()
        output = sde_step(velocity, latents, 1.0, sigma_max, noise_level, sigma_max=sigma_max)
        assert output.std.equal(torch.full((3,), noise_level))
        # at sigma 1 the noise is known without the velocity: it is the latents
        expected = (1 - noise_level**2 / 2) * latents - (1 - sigma_max) * velocity
        torch.testing.assert_close(output.mean, expected)

    def test_a_noise_level_of_root_two_erases_the_first_latents(self):
        velocity, latents = random_step()
        output = sde_step(0 * velocity, latents, 1.0, 0.9, math.sqrt(2), sigma_max=0.9)
        torch.testing.assert_close(output.mean, torch.zeros_like(latents))

    def test_sigma_max_matters_in_the_first_step_only(self):
        velocity, latents = random_step()
        sigmas = make_scheduler("flux", 6).sigmas
        for step in pairwise(sigmas[1:-1]):
            with_it = sde_step(velocity, latents, *step, 0.9, sigma_max=sigmas[1])
            assert with_it.std.equal(sde_step(velocity, latents, *step, 0.9).std)

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_without_noise_every_step_is_that_of_diffusers(self, schedule, dynamics):
        scheduler = make_scheduler(*schedule)
        _, ours = random_step()
        theirs = ours
        for i, timestep in enumerate(scheduler.timesteps):
            velocity, _ = random_step(seed=i)
            theirs = scheduler.step(velocity, timestep, theirs).prev_sample
            output = sde_step(velocity, ours, scheduler.sigmas[i], scheduler.sigmas[i + 1], 0.0, dynamics=dynamics)
            ours = output.next_latents
            assert ours.equal(theirs)
            assert output.mean.equal(theirs)
            assert output.std.equal(torch.zeros(3))

    def test_noise_that_is_left_beyond_what_the_next_sigma_says(self):
        image, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])

        def excess(schedule, noise_level, dynamics):
            sigmas = make_scheduler(*schedule).sigmas
            outputs = [
                sde_step(noise - image, (1 - t) * image + t * noise, t, t_next, noise_level, dynamics=dynamics,
                         sigma_max=sigmas[1])
                for t, t_next in pairwise(sigmas[:-1])
            ]  # fmt: skip
            return [
                math.hypot(output.mean[0, 1], output.std) / sigma
                for output, sigma in zip(outputs, sigmas[1:-1], strict=True)
            ]

        assert max(excess(("flux", 6), 0.9, "flow_sde")) == pytest.approx(1.5, abs=0.05)
        assert min(excess(("flux", 6), 0.9, "flow_sde")) > 1.1
        assert excess(("sd3", 10), 0.7, "flow_sde")[-1] == pytest.approx(27, abs=0.5)
        for schedule in SCHEDULES:
            for dynamics in ("cps", "precise"):
                assert excess(schedule, 0.8, dynamics) == pytest.approx([1] * (schedule[1] - 1), abs=1e-6)


class TestLaw:
    """Data `N(0, 0.5²)`: at sigma t the latents are `N(0, (0.5 (1 - t))² + t²)`, and the velocity is known exactly."""

    @staticmethod
    def std_at(t):
        return math.hypot(0.5 * (1 - t), t)

    def simulate(self, sigmas, noise_level, dynamics, num_elements=200_000):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, num_elements, generator=generator)
        latents *= self.std_at(sigmas[0]) / latents.std()
        for t, t_next in pairwise(sigmas):
            velocity = latents * (t - 0.25 * (1 - t)) / self.std_at(t) ** 2  # E[e - x0 | latents]
            noise = noise_level if t_next > 0 else 0.0
            latents = sde_step(
                velocity, latents, t, t_next, noise, dynamics=dynamics, sigma_max=sigmas[1], generator=generator
            ).next_latents
        return latents.std().item()

    @pytest.mark.parametrize(
        ("dynamics", "noise_level", "std"),
        [
            ("flow_sde", 0.9, 0.490),
            ("flow_sde", 0.7, 0.490),
            ("dance_sde", 0.3, 0.4875),
            ("dance_sde", 1.0, 0.490),
            ("cps", 0.8, 0.3915),
            ("precise", 0.9, 0.4855),
        ],
    )
    def test_of_the_latents_after_many_steps(self, dynamics, noise_level, std):
        sigmas = torch.linspace(0.98, 0.02, 201, dtype=torch.float64).tolist()
        simulated = self.simulate(sigmas, noise_level, dynamics)
        assert simulated == pytest.approx(std, abs=0.003)
        if dynamics != "cps":  # preserves coefficients, not the law
            assert simulated == pytest.approx(self.std_at(0.02), abs=0.006)

    @pytest.mark.parametrize(
        ("dynamics", "noise_level", "std"),
        [
            ("flow_sde", 0.0, 0.349),
            ("flow_sde", 0.9, 0.450),
            ("flow_sde", 0.7, 0.422),
            ("dance_sde", 0.3, 0.359),
            ("cps", 0.8, 0.302),
            ("precise", 1.5, 0.3075),
        ],
    )
    def test_of_images_from_six_steps(self, dynamics, noise_level, std):
        sigmas = make_scheduler("flux", 6).sigmas.tolist()
        assert self.simulate(sigmas, noise_level, dynamics) == pytest.approx(std, abs=0.003)


class TestLogProbs:
    @pytest.mark.parametrize("dynamics", DYNAMICS)
    @pytest.mark.parametrize(("t", "t_next"), STEPS)
    def test_are_the_mean_log_density(self, dynamics, t, t_next):
        velocity, latents = random_step()
        output = sde_step(velocity, latents, t, t_next, NOISE_LEVELS[dynamics], dynamics=dynamics,
                          generator=generators(1, 2, 3))  # fmt: skip
        normal = torch.distributions.Normal(output.mean.double(), output.std.double()[:, None, None])
        expected = normal.log_prob(output.next_latents.double()).mean((1, 2))
        torch.testing.assert_close(output.log_probs, expected.float(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dynamics", DYNAMICS)
    def test_of_a_sampled_step_are_found_again_bit_for_bit(self, dynamics, dtype):
        sigmas = make_scheduler("flux", 6).sigmas
        velocity, latents = (tensor.to(dtype) for tensor in random_step((5, 63, 7)))
        kwargs = dict(noise_level=NOISE_LEVELS[dynamics], dynamics=dynamics)
        for i, (t, t_next) in enumerate(pairwise(sigmas[:-1])):
            sigma_max = sigmas[1] if i == 0 else None
            sampled = sde_step(velocity, latents, t, t_next, sigma_max=sigma_max, generator=generators(*range(5)),
                               **kwargs)  # fmt: skip
            # given as numbers or for each image, and in a call that keeps gradients
            for form in (float, lambda sigma: sigma.expand(5), lambda sigma: sigma):
                scored = sde_step(
                    velocity.clone().requires_grad_(), latents, form(t), form(t_next), sigma_max=sigma_max,
                    next_latents=sampled.next_latents, **kwargs,
                )  # fmt: skip
                for name, tensor in vars(sampled).items():
                    assert getattr(scored, name).equal(tensor)

    def test_have_the_gradient_of_given_next_latents_whether_sampled_or_given(self):
        velocity, latents = random_step()
        velocity.requires_grad_()
        sampled = sde_step(velocity, latents, 0.6, 0.4, 0.7, generator=generators(1, 2, 3))
        assert not sampled.next_latents.requires_grad
        (gradient,) = torch.autograd.grad(sampled.log_probs.sum(), velocity)
        z = (sampled.next_latents - sampled.mean) / sampled.std[0]
        expected = z / sampled.std[0] / latents[0].numel() * -0.2 * (1 + 0.7**2 / 2)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize(("num_elements", "spread"), [(65_536, 3.9e-5), (262_144, 1.95e-5)])
    def test_ratio_of_a_policy_that_moved(self, num_elements, spread):
        delta, t, t_next, a, num_images = 0.01, 0.6525, 0.4842, 0.9, 160
        latents, velocity = torch.zeros(2, 16, num_elements // 64, 64)
        generator = torch.Generator().manual_seed(0)
        log_ratio = []
        for _ in range(num_images // len(latents)):
            old = sde_step(velocity, latents, t, t_next, a, generator=generator)
            # a shift of the mean by delta standard deviations
            moved = velocity + delta * old.std[0] / ((t - t_next) * (1 + a**2 / 2))
            new = sde_step(moved, latents, t, t_next, a, next_latents=old.next_latents)
            log_ratio.append(new.log_probs - old.log_probs)
        log_ratio = torch.cat(log_ratio)
        assert log_ratio.mean().item() == pytest.approx(-5.0e-5, abs=4 * spread / math.sqrt(num_images))
        assert log_ratio.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * num_images))
        assert spread == pytest.approx(delta / math.sqrt(num_elements), rel=0.01)


class TestNoise:
    def test_of_an_image_does_not_depend_on_its_batch(self):
        velocity, latents = random_step()
        together = sde_step(velocity, latents, 0.9, 0.8, 0.7, generator=generators(1, 2, 3)).next_latents
        for i, seed in enumerate((1, 2, 3)):
            alone = sde_step(velocity[i, None], latents[i, None], 0.9, 0.8, 0.7, generator=generators(seed))
            assert alone.next_latents.equal(together[i, None])
        pair = sde_step(velocity[1:], latents[1:], 0.9, 0.8, 0.7, generator=generators(2, 3)).next_latents
        assert pair.equal(together[1:])

    def test_of_one_generator_is_drawn_image_by_image(self):
        velocity, latents = random_step((3, 5, 7))
        (one,), (same,) = generators(4), generators(4)
        together = sde_step(velocity, latents, 0.9, 0.8, 0.7, generator=one).next_latents
        for i in range(3):
            alone = sde_step(velocity[i, None], latents[i, None], 0.9, 0.8, 0.7, generator=same).next_latents
            assert alone.equal(together[i, None])

    def test_is_the_global_generators_without_another(self):
        velocity, latents = random_step()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            ours = sde_step(velocity, latents, 0.9, 0.8, 0.7)
            torch.manual_seed(5)
            again = sde_step(velocity, latents, 0.9, 0.8, 0.7)
        assert ours.next_latents.equal(again.next_latents)

    @pytest.mark.parametrize("dynamics", DYNAMICS)
    def test_is_standard_normal_in_units_of_the_std(self, dynamics):
        latents, velocity = torch.zeros(2, 2, 100_000)
        output = sde_step(velocity, latents, 0.7, 0.5, 0.5, dynamics=dynamics, generator=generators(1, 2))
        z = output.next_latents / output.std[:, None]
        assert z.mean().item() == pytest.approx(0, abs=0.01)
        assert z.std().item() == pytest.approx(1, abs=0.01)
        assert (z[0] * z[1]).mean().item() == pytest.approx(0, abs=0.02)

    @pytest.mark.parametrize(("noise_level", "scored"), [(0.0, False), (0.7, True)])
    def test_is_not_drawn_where_none_is_needed(self, noise_level, scored):
        velocity, latents = random_step()
        (generator,) = generators(1)
        before = generator.get_state()
        sde_step(velocity, latents, 0.9, 0.8, noise_level, next_latents=latents if scored else None,
                 generator=generator)  # fmt: skip
        assert generator.get_state().equal(before)


class TestDeterministicSteps:
    def test_have_no_log_prob_and_no_gradient(self):
        velocity, latents = random_step()
        velocity.requires_grad_()
        output = sde_step(velocity, latents, 1.0, 0.9, 0.0)
        assert output.next_latents.equal(output.mean)
        output.log_probs.sum().backward()
        assert output.log_probs.equal(torch.zeros(3))
        assert velocity.grad.equal(torch.zeros_like(latents))

    @pytest.mark.parametrize(
        ("sigma_next", "noise_level", "dynamics"),
        [(0.8, 0.0, "flow_sde"), (0.8, 0.0, "cps"), (0.0, 0.8, "cps"), (0.0, 1.5, "precise")],
    )
    def test_cannot_be_scored(self, sigma_next, noise_level, dynamics):
        velocity, latents = random_step()
        with pytest.raises(ValueError, match=r"deterministic.*score only the stochastic steps"):
            sde_step(velocity, latents, 0.9, sigma_next, noise_level, dynamics=dynamics, next_latents=latents)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(dynamics="ddim"), r"Unknown dynamics 'ddim': use one of 'flow_sde', 'dance_sde', 'cps', 'precise'"),
        (dict(noise_level=-0.1), r"noise_level is -0.1: use a value of at least 0"),
        (dict(noise_level=1.1, dynamics="cps"), r"noise_level is 1.1: .* in 'cps' at most 1"),
        (dict(sigma=1.0), r"pass the schedule's second sigma as sigma_max"),
        (dict(sigma=0.5), r"Steps from sigma 0.5 to 0.8, 0.5 to 0.8: use sigmas that fall from 1 to 0"),
        (dict(sigma=900.0), r"sigmas that fall from 1 to 0"),
        (dict(sigma_next=-0.1), r"sigmas that fall from 1 to 0"),
        (dict(sigma=torch.ones(3)), r"sigma has shape \(3,\): use a number or one value for each of 2 images"),
        (dict(generator=generators(1)), r"1 generators for 2 images"),
        (dict(velocity=torch.zeros(1, 4, 4)), r"velocity has shape \(1, 4, 4\): use that of latents, \(2, 4, 4\)"),
        (dict(next_latents=torch.zeros(2, 4)), r"next_latents has shape \(2, 4\)"),
    ],
)
def test_an_argument_outside_of_its_range_is_an_error(changed, message):
    latents = torch.zeros(2, 4, 4)
    arguments = dict(velocity=latents, latents=latents, sigma=0.9, sigma_next=0.8, noise_level=0.7) | changed
    with pytest.raises(ValueError, match=message):
        sde_step(**arguments)


class TestWindow:
    def test_of_all_steps_leaves_out_the_last(self):
        assert sde_window(6, None, None, seed=0, rollout_index=0) == (0, 1, 2, 3, 4)
        assert sde_window(6, None, (1, 3), seed=3, rollout_index=7) == (0, 1, 2, 3, 4)

    @pytest.mark.parametrize(
        ("num_steps", "size", "window_range", "starts"),
        [
            (10, 2, None, {0, 1, 2, 3}),
            (6, 2, None, {0, 1}),
            (6, 3, (0, 3), {0}),
            (6, 1, (1, 4), {1, 2, 3}),
            (6, 4, None, {0}),
            (6, 2, (0, 5), {0, 1, 2, 3}),
            (2, 1, None, {0}),
        ],
    )
    def test_takes_every_place_in_its_range_equally_often(self, num_steps, size, window_range, starts):
        num_rollouts = 2000
        windows = [
            sde_window(num_steps, size, window_range, seed=42, rollout_index=step) for step in range(num_rollouts)
        ]
        assert all(window == tuple(range(window[0], window[0] + size)) for window in windows)
        counts = {start: sum(window[0] == start for window in windows) for start in starts}
        assert sum(counts.values()) == num_rollouts
        expected = num_rollouts / len(starts)
        assert all(abs(count - expected) <= 4 * math.sqrt(expected) for count in counts.values())

    def test_depends_on_seed_and_step_alone(self):
        def windows(seed):
            return [sde_window(20, 2, (0, 10), seed=seed, rollout_index=step) for step in range(200)]

        with torch.random.fork_rng():
            torch.manual_seed(1)
            first = windows(0)
            torch.manual_seed(2)
            assert windows(0) == first
        # neighbours agree as often as chance has it: 1 of 9
        for other in (windows(1), [*first[1:], first[0]]):
            assert sum(a == b for a, b in zip(first, other, strict=True)) < 45
        # the same in every version of numpy and Python
        assert [start for start, _ in first[:4]] == [7, 7, 2, 0]

    @pytest.mark.parametrize(
        ("num_steps", "size", "window_range", "message"),
        [
            (1, None, None, "num_inference_steps is 1: use at least 2"),
            (6, 0, None, "sde_window_size is 0: use 1 to 5, or None"),
            (6, 6, None, "sde_window_size is 6: use 1 to 5, or None"),
            (6, 3, (0, 2), r"sde_window_range is \(0, 2\): a window of 3 steps needs .* first \+ 3 <= stop"),
            (6, 2, (4, 6), r"sde_window_range is \(4, 6\): .* stop <= 5, as the last of 6 steps"),
            (6, 2, (-1, 3), r"sde_window_range is \(-1, 3\)"),
        ],
    )
    def test_that_does_not_fit_is_an_error(self, num_steps, size, window_range, message):
        with pytest.raises(ValueError, match=message):
            sde_window(num_steps, size, window_range, seed=0, rollout_index=0)
