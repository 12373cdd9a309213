"""The algorithm: what is sampled, selected, trained on, and how much it costs. Tiny FLUX pipelines on the CPU."""

import copy
import itertools
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig
from transformers import TrainerCallback

from trl_spatial import DiffusionGRPOConfig
from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy
from trl_spatial.diffusion_grpo.rollout import rollout_prompts, sample_rollout
from trl_spatial.generation.seeds import image_generator


PROMPTS = ["a red cube", "a cat to the left of a dog", "the lamp", "a small blue sphere"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def redness(prompts, images, **columns):
    pixels = [np.asarray(image).astype(float) / 255 for image in images]
    return [float(image[..., 0].mean() - image[..., 1:].mean()) for image in pixels]


def lora_config(**kwargs):
    return LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, **kwargs)


def training_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


class Recorder(TrainerCallback):
    """Keeps the trained weights before, and the gradients of, every update."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights.append({name: weight.detach().clone() for name, weight in trained.items()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.gradients.append({name: weight.grad.clone() for name, weight in trained.items()})


# The ratio


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "updates",
    [{}, {"num_iterations": 2}, {"steps_per_generation": 4, "num_iterations": 2}],
    ids=str,
)
def test_the_first_ratio_after_a_rollout_is_exactly_1(
    make_trainer, make_pipeline, updates, dtype, gradient_checkpointing
):
    trainer = make_trainer(
        pipeline=make_pipeline(dtype),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=gradient_checkpointing,
        max_steps=5 if len(updates) == 2 else 3,
        **updates,
    )
    trainer.train()
    logs = training_logs(trainer)
    num_updates = trainer.args.num_updates_per_rollout
    assert len(logs) > num_updates
    for log in logs[::num_updates]:
        assert (log["ratio/mean"], log["ratio/std"]) == (1.0, 0.0)
        assert "reward" in log
    for log in [log for step, log in enumerate(logs) if step % num_updates]:
        assert log["ratio/std"] > 0  # the weights have moved since the rollout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_log_probs_of_later_batches_are_those_of_training(make_trainer, make_pipeline, dtype):
    # If the weights stand still, every ratio is 1: those of the batches that were scored after the rollout too.
    trainer = make_trainer(
        pipeline=make_pipeline(dtype),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=True,
        learning_rate=0.0,
        steps_per_generation=6,
        num_iterations=2,
        max_steps=6,
    )
    trainer.train()
    assert {(log["ratio/mean"], log["ratio/std"]) for log in training_logs(trainer)} == {(1.0, 0.0)}
    # 2 batches of 2 images are trained on first; the other 4 were scored before, at 2 steps
    assert training_logs(trainer)[-1]["num_old_log_prob_passes"] == 4 * 2 * 2


# The cost


class EvaluationCounter:
    """Counts images in passes through a transformer, from outside: by hooks of PyTorch."""

    def __init__(self, transformer):
        self.policy, self.reference, self.no_grad_policy = 0, 0, 0
        adapter = transformer.transformer_blocks[0].attn.to_q  # switched with all the others

        def count_forward(module, args, kwargs, output=None):
            # A recomputed forward passes here too, within the backward
            num_images = len(kwargs["hidden_states"] if kwargs else args[0])
            if adapter.disable_adapters:
                self.reference += num_images
            else:
                self.policy += num_images
                self.no_grad_policy += 0 if torch.is_grad_enabled() else num_images

        def count_backward(module, grad_input, grad_output):
            self.policy += len(grad_output[0])

        transformer.transformer_blocks[0].register_forward_pre_hook(count_forward, with_kwargs=True)
        transformer.proj_out.register_full_backward_hook(count_backward)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("settings", "evaluations_per_image"),
    [  # T + (2 or 3) · K · kept / G
        ({"top_k": None}, (4 + 2 * 3, 4 + 3 * 3)),
        ({"top_k": 1}, (4 + 2 * 3 / 2, 4 + 3 * 3 / 2)),
        ({"top_k": 1, "sde_window_size": 2, "beta": 0.0}, (4 + 2 * 2 / 2, 4 + 3 * 2 / 2)),
    ],
    ids=str,
)
def test_filtered_images_and_steps_cost_nothing(make_trainer, settings, evaluations_per_image, gradient_checkpointing):
    trainer = make_trainer(gradient_checkpointing=gradient_checkpointing, num_inference_steps=4, **settings)
    counter = EvaluationCounter(trainer.model)
    trainer.train()
    log = training_logs(trainer)[-1]
    args = trainer.args
    assert log["num_images"] == 2 * args.num_prompts_per_device * args.num_generations
    assert log["num_policy_passes"] == counter.policy
    assert log["num_policy_passes"] / log["num_images"] == evaluations_per_image[gradient_checkpointing]
    assert log["num_reference_passes"] == counter.reference
    assert counter.no_grad_policy == log["num_images"] * args.num_inference_steps  # of the rollouts, nothing else
    num_steps = args.sde_window_size or 3
    assert counter.reference == (0 if args.beta == 0 else log["num_images"] * num_steps * args.num_kept / 4)


# The gradient

# It starts far from the reference: the KL divergence is large enough to be seen in loss and gradient.
ADAPTER = {"r": 2, "lora_alpha": 64, "target_modules": TARGETS, "init_lora_weights": False}


def paper_loss(pipeline, sigmas, rollout, prompts, advantages, args, old=None):
    """
    The objective of the papers, written out: all kept images of a rollout at once. Also the mean KL divergence, and what the
    next update needs of this policy: log-probs and mean of each step.
    """
    num_images, sigmas = len(prompts), sigmas.tolist()
    prompt_embeds, pooled_embeds, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=16)
    image_ids = pipeline._prepare_latent_image_ids(num_images, 2, 2, "cpu", torch.float32)
    sizes = [t - t_next for t, t_next in itertools.pairwise(sigmas[:-1])]
    losses, kls, policies = [], [], []
    for step, h in enumerate(sizes):
        t, t_next = sigmas[step : step + 2]
        x, x_next = rollout.latents[:, step], rollout.next_latents[:, step]

        def mean_of_step(x=x, t=t, t_next=t_next, h=h, step=step):
            v = pipeline.transformer(
                hidden_states=x,
                timestep=torch.full((num_images,), t),
                guidance=torch.full((num_images,), args.guidance_scale),
                pooled_projections=pooled_embeds,
                encoder_hidden_states=prompt_embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
            ).sample
            clean, noise = x - t * v, x + (1 - t) * v
            if args.dynamics == "cps":
                angle = args.noise_level * math.pi / 2
                return v, (1 - t_next) * clean + t_next * math.cos(angle) * noise, t_next * math.sin(angle)
            if args.dynamics == "precise":
                kept = (t_next * (1 - t) / (t * (1 - t_next))) ** (args.noise_level**2)
                return v, (1 - t_next) * clean + t_next * kept**0.5 * noise, t_next * (1 - kept) ** 0.5
            rate = args.noise_level**2
            if args.dynamics == "flow_sde":
                rate *= t / (1 - (sigmas[1] if step == 0 else t))
            return v, x - h * (v + rate / (2 * t) * noise), (rate * h) ** 0.5

        velocity, mean, std = mean_of_step()
        log_probs = torch.distributions.Normal(mean, torch.tensor(std)).log_prob(x_next).mean(dim=(1, 2))
        policies.append((log_probs.detach(), mean.detach()))
        old_log_probs, old_mean = policies[-1] if old is None else old[step]
        log_ratio = log_probs - old_log_probs
        moved = ((mean - old_mean) ** 2).mean(dim=(1, 2)) / (2 * std**2)
        if args.kl_mask is not None:
            moves_away = (log_ratio > 0) & (advantages > 0) | (log_ratio < 0) & (advantages < 0)
            losses.append(torch.where((moved > args.kl_mask) & moves_away, 0.0, -log_ratio.exp() * advantages))
        else:
            ratio = torch.exp(log_ratio + moved if args.ratio_norm else log_ratio)
            clipped = ratio.clamp(1 - args.epsilon, 1 + (args.epsilon_high or args.epsilon))
            weight = sum(sizes) / len(sizes) / h if args.ratio_norm else 1.0
            losses.append(-weight * torch.minimum(ratio * advantages, clipped * advantages))
        with torch.no_grad():
            pipeline.transformer.disable_adapters()
            reference_velocity, reference_mean, _ = mean_of_step()
            pipeline.transformer.enable_adapters()
        if args.kl_estimator == "velocity":
            kls.append(((velocity - reference_velocity) ** 2).mean(dim=(1, 2)))
        else:
            kls.append(((mean - reference_mean) ** 2 / (2 * std**2)).mean(dim=(1, 2)))
    loss = (torch.stack(losses) + args.beta * torch.stack(kls)).mean()
    return loss, torch.stack(kls).mean(), policies


def expected_advantages(rewards, num_generations, top_k):
    """Indices of the best and the worst of every group, and their standardised rewards."""
    kept, advantages = [], []
    for start in range(0, len(rewards), num_generations):
        group = np.array(rewards[start : start + num_generations])
        order = np.argsort(group)
        chosen = np.sort(np.concatenate([order[:top_k], order[-top_k:]]))
        kept += [start + int(index) for index in chosen]
        advantages += ((group[chosen] - group[chosen].mean()) / group[chosen].std()).tolist()
    return kept, torch.tensor(advantages, dtype=torch.float32)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_gradient_is_that_of_the_papers_formula(make_trainer, make_pipeline, gradient_checkpointing):
    seen = {"prompts": [], "rewards": []}

    def recorded_redness(prompts, images, **columns):
        seen["prompts"] += prompts
        seen["rewards"] += redness(prompts, images)
        return seen["rewards"][-len(images) :]

    recorder = Recorder()
    trainer = make_trainer(
        recorded_redness,
        callbacks=[recorder],
        peft_config=LoraConfig(**ADAPTER),
        num_generations=6,
        top_k=2,
        gradient_accumulation_steps=4,
        num_iterations=2,
        gradient_checkpointing=gradient_checkpointing,
        beta=0.3,
        epsilon=2e-4,
        max_grad_norm=0.0,
        max_steps=2,
    )
    args = trainer.args
    trainer.train()

    # The same rollout from a fresh pipeline
    pipeline = make_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(**ADAPTER))
    pipeline.transformer.load_state_dict(recorder.weights[0], strict=False)
    options = SamplingOptions(16, 16, 3, args.guidance_scale)
    sigmas = scheduler_sigmas(pipeline)
    prompts, rewards = seen["prompts"], seen["rewards"]
    assert len(prompts) == 12 and prompts == [prompts[0]] * 6 + [prompts[6]] * 6
    policy = make_policy(pipeline, max_sequence_length=16)
    rollout = sample_rollout(
        policy,
        pipeline.transformer,
        policy.encode_prompt(prompts),
        [image_generator(args.seed, 0, group, image) for group in range(2) for image in range(6)],
        options,
        sigmas=sigmas,
        trained_steps=(0, 1),
        noise_level=args.noise_level,
        dynamics="flow_sde",
        batch_size=12,
    )
    assert redness(prompts, rollout.images) == pytest.approx(rewards, abs=2e-3)  # one level of a pixel in some
    kept, advantages = expected_advantages(rewards, 6, 2)
    rollout.latents, rollout.next_latents = rollout.latents[kept], rollout.next_latents[kept]
    prompts = [prompts[index] for index in kept]

    old = None
    for update in range(2):
        pipeline.transformer.load_state_dict(recorder.weights[update], strict=False)
        pipeline.transformer.zero_grad()
        loss, kl, policy = paper_loss(pipeline, sigmas, rollout, prompts, advantages, args, old)
        loss.backward()
        log = training_logs(trainer)[update]
        assert log["kl"] == pytest.approx(kl.item(), rel=1e-3)
        assert log["kl"] > 1e-3
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        expected = dict(pipeline.transformer.named_parameters())
        for name, gradient in recorder.gradients[update].items():
            assert gradient.abs().max() > 0
            size = expected[name].grad.abs().max().item()
            torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-3, atol=2e-3 * size)
        if update == 1:
            assert log["clip_ratio/low"] + log["clip_ratio/high"] > 0  # the clip was at work
            assert log["ratio/std"] > 0
        old = policy


SWITCHES = [
    {},
    {"advantage_scope": "group", "dynamics": "dance_sde", "noise_level": 0.4},
    {"scale_rewards": "batch", "kl_estimator": "velocity", "ratio_norm": True},
    {"scale_rewards": "none", "dynamics": "cps", "noise_level": 0.8, "kl_mask": 1e-7},
    {"multi_objective_aggregation": "normalize_then_sum", "ratio_norm": True, "epsilon_high": 1e-7},
    {"advantage_scope": "group", "scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"},
    {"advantage_scope": "group", "scale_rewards": "none", "kl_mask": 1e-7, "kl_estimator": "velocity"},
]
WEIGHTS = [1.0, -0.05]
REWARDS = np.random.default_rng(3).normal(size=(12, 2)) * [1.0, 30.0]


def written_out_advantages(args):
    """Kept images and their advantages, from `REWARDS` by numpy."""
    groups = REWARDS.reshape(2, 6, 2)
    if args.multi_objective_aggregation == "normalize_then_sum":
        groups = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    combined = groups @ WEIGHTS  # (2, 6)
    order = combined.argsort(1)
    kept = np.sort(np.concatenate([order[:, :2], order[:, -2:]], axis=1), axis=1)
    chosen = np.take_along_axis(combined, kept, 1)
    scope = chosen if args.advantage_scope == "kept" else combined
    scale = {"group": scope.std(1, keepdims=True), "batch": scope.std(), "none": 1.0}[args.scale_rewards]
    advantages = ((chosen - scope.mean(1, keepdims=True)) / scale).clip(-5, 5)
    return (kept + np.array([[0], [6]])).flatten().tolist(), torch.tensor(advantages.flatten(), dtype=torch.float32)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_gives_the_gradient_of_its_formula(make_trainer, make_pipeline, switches):
    recorder, seen, buffers = Recorder(), [], []

    def first(prompts, images):
        seen.extend(prompts)
        return REWARDS[:, 0]

    def second(prompts, images):
        return REWARDS[:, 1]

    class Buffers(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            buffers.append(trainer._buffer)

    trainer = make_trainer(
        [first, second],
        callbacks=[recorder, Buffers()],
        peft_config=LoraConfig(**ADAPTER),
        reward_weights=WEIGHTS,
        num_generations=6,
        top_k=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        num_iterations=2,
        **{"beta": 0.3, "epsilon": 2e-4, "max_grad_norm": 0.0, "max_steps": 2, "learning_rate": 2e-3, **switches},
    )
    trainer.train()
    pipeline = make_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(**ADAPTER))
    sigmas, rollout = scheduler_sigmas(pipeline), buffers[0]

    def gradients(args):
        """Of both updates, with the weights that the trainer had."""
        kept, advantages = written_out_advantages(args)
        if [seen[index] for index in kept] != rollout.prompts:
            return None
        found, old = [], None
        for weights in recorder.weights:
            pipeline.transformer.load_state_dict(weights, strict=False)
            pipeline.transformer.zero_grad()
            loss, _, policy = paper_loss(pipeline, sigmas, rollout, rollout.prompts, advantages, args, old)
            loss.backward()
            names = dict(pipeline.transformer.named_parameters())
            found.append({name: names[name].grad.clone() for name in recorder.gradients[0]})
            old = old or policy
        return found

    def distance(found):
        if found is None:
            return math.inf
        return max(
            ((gradient - other[name]).norm() / gradient.norm()).item()
            for gradients, other in zip(recorder.gradients, found, strict=True)
            for name, gradient in gradients.items()
        )

    kept, _ = written_out_advantages(trainer.args)
    assert [seen[index] for index in kept] == rollout.prompts
    assert distance(gradients(trainer.args)) < 5e-3
    for name in switches.keys() - {"noise_level"}:  # each of them matters, so that none can be left out
        default = copy.copy(trainer.args)
        setattr(default, name, DiffusionGRPOConfig.__dataclass_fields__[name].default)
        assert distance(gradients(default)) > 2e-2, name


def scheduler_sigmas(pipeline):
    scheduler = pipeline.scheduler
    shift = calculate_shift(4, scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 3, 3), mu=shift)
    return scheduler.sigmas


@pytest.mark.parametrize(
    "batches",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"rollout_batch_size": 5},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_batch_sizes_and_checkpointing_change_nothing_but_rounding(make_trainer, batches):
    def gradients(**kwargs):
        recorder = Recorder()
        trainer = make_trainer(callbacks=[recorder], max_grad_norm=0.0, max_steps=1, **kwargs)
        trainer.train()
        return recorder.gradients[0], training_logs(trainer)[0]

    (expected, expected_log), (gradient, log) = gradients(), gradients(**batches)
    assert log["reward"] == pytest.approx(expected_log["reward"], abs=1e-3)
    for name in expected:
        size = expected[name].abs().max().item()
        torch.testing.assert_close(gradient[name], expected[name], rtol=0, atol=0.02 * size + 1e-9)


# Variants of the objective


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamics": "dance_sde", "noise_level": 0.3},
        {"dynamics": "cps", "noise_level": 0.8},
        {"dynamics": "precise", "noise_level": 1.5},
        {"ratio_norm": True},
        {"kl_mask": 1e-5},
        {"kl_estimator": "velocity"},
        {"scale_rewards": "batch"},
        {"advantage_scope": "group", "scale_rewards": "none"},
        {"sde_window_size": 1, "sde_window_range": [0, 2]},
        {"epsilon_high": 1e-2},
    ],
    ids=str,
)
def test_switches_of_the_objective(make_trainer, settings):
    trainer = make_trainer(num_iterations=2, max_steps=4, **settings)
    before = trainer.model.transformer_blocks[0].attn.to_q.lora_B.default.weight.detach().clone()
    trainer.train()
    logs = training_logs(trainer)
    assert [log["ratio/std"] == 0 for log in logs] == [True, False, True, False]
    assert all(np.isfinite([log["loss"], log["kl"], log["grad_norm"]]).all() and log["grad_norm"] > 0 for log in logs)
    assert not torch.equal(before, trainer.model.transformer_blocks[0].attn.to_q.lora_B.default.weight)


def test_the_mask_drops_terms_instead_of_clipping_them(make_trainer):
    def run(threshold):
        trainer = make_trainer(num_iterations=2, learning_rate=0.05, kl_mask=threshold, beta=0.0, epsilon=1e-9)
        trainer.train()
        first, second = training_logs(trainer)
        assert first["clip_ratio/low"] + first["clip_ratio/high"] == 0  # nothing has moved
        return second["clip_ratio/low"] + second["clip_ratio/high"]

    assert run(1e-12) > 0.5  # most terms went where the first update sent them
    assert run(1e6) == 0


# What is trained


def test_the_reference_is_the_transformer_without_adapters(make_trainer, make_pipeline):
    trainer = make_trainer(max_steps=3)
    base = dict(make_pipeline().transformer.named_parameters())
    trainer.train()
    logs = training_logs(trainer)
    assert logs[0]["kl"] == 0.0 and logs[2]["kl"] > 0  # adapters start at zero
    trained, frozen = {}, {}
    for name, parameter in trainer.model.named_parameters():
        (trained if parameter.requires_grad else frozen)[name.replace(".base_layer", "")] = parameter
    assert all("lora_" in name for name in trained)
    assert frozen.keys() == base.keys()
    assert all(torch.equal(parameter, base[name]) for name, parameter in frozen.items())
    others = [trainer.policy.vae, *trainer.policy.encoders]
    assert not any(parameter.requires_grad for module in others for parameter in module.parameters())


def test_adapters_are_float32_on_a_base_that_keeps_its_dtype(make_trainer, make_pipeline):
    trainer = make_trainer(pipeline=make_pipeline(torch.bfloat16), bf16=True)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    ("dtype", "kwargs", "is_used"),
    [
        (torch.bfloat16, {}, False),  # adapters compute as what is frozen
        (torch.float32, {}, True),
        (torch.float32, {"peft_config": None, "beta": 0.0}, True),
    ],
)
def test_autocast_is_for_weights_of_float32(make_trainer, make_pipeline, dtype, kwargs, is_used):
    trainer = make_trainer(
        pipeline=make_pipeline(dtype), bf16=True, eval_dataset=[{"prompt": "a cat"}], eval_on_start=True, **kwargs
    )
    states = []
    trainer.model.proj_out.register_forward_pre_hook(lambda *_: states.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    assert set(states) == {is_used}


def test_full_fine_tuning(make_trainer, make_pipeline):
    trainer = make_trainer(peft_config=None, beta=0.0, learning_rate=1e-3, bf16=True)
    base = dict(make_pipeline().transformer.named_parameters())
    trainer.train()
    logs = training_logs(trainer)
    assert {(log["ratio/mean"], log["ratio/std"]) for log in logs} == {(1.0, 0.0)}
    changed = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, base[name])]
    assert {name.split(".")[0] for name in changed} >= {"x_embedder", "transformer_blocks", "proj_out"}
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())


def test_an_adapter_that_is_there_is_trained_further(make_trainer, make_pipeline):
    pipeline = make_pipeline()
    pipeline.transformer.add_adapter(lora_config(init_lora_weights=False))
    pipeline.transformer.requires_grad_(False)
    trainer = make_trainer(pipeline=pipeline, peft_config=None)
    trainer.train()
    assert training_logs(trainer)[0]["kl"] > 0  # the reference is the base, not the adapter's start
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)


def test_adapters_that_are_switched_off_are_switched_on(make_trainer, make_pipeline):
    """Without a reference policy too, which switches them: the first rollout is drawn by what is trained."""
    logs = []
    for is_off in (False, True):
        pipeline = make_pipeline()
        pipeline.transformer.add_adapter(lora_config(init_lora_weights=False))
        if is_off:
            pipeline.transformer.disable_adapters()
        trainer = make_trainer(pipeline=pipeline, peft_config=None, beta=0.0, max_steps=1)
        trainer.train()
        logs.append({name: training_logs(trainer)[0][name] for name in ("reward", "grad_norm")})
    assert logs[0] == logs[1] and logs[0]["grad_norm"] > 0


def test_adapters_that_are_fused_are_an_error(make_trainer, make_pipeline):
    pipeline = make_pipeline()
    pipeline.transformer.add_adapter(lora_config(init_lora_weights=False))
    pipeline.fuse_lora()
    with pytest.raises(
        ValueError, match=r"are fused into the weights. `pipeline.unfuse_lora\(\)`.*unload_lora_weights"
    ):
        make_trainer(pipeline=pipeline, peft_config=None)
    pipeline.unload_lora_weights()
    make_trainer(pipeline=pipeline)


# Rollouts


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_columns_and_groups(make_trainer, num_iterations):
    calls = []

    def reward(prompts, images, scene, **columns):
        assert len(prompts) == len(images) == len(scene) and not columns
        calls.append((list(prompts), list(scene)))
        return redness(prompts, images)

    rows = [{"prompt": prompt, "scene": {"name": prompt}} for prompt in PROMPTS]
    rows = rows if num_iterations == 1 else Dataset.from_list(rows)
    make_trainer(reward, train_dataset=rows, num_iterations=num_iterations, max_steps=2 * num_iterations).train()
    assert len(calls) == 2
    for prompts, scenes in calls:
        assert [scene["name"] for scene in scenes] == prompts
        assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
    first, second = ({prompts[0], prompts[4]} for prompts, _ in calls)
    assert first | second == set(PROMPTS)  # an epoch is two rollouts


@pytest.mark.parametrize(("num_rows", "num_prompts"), [(4, 2), (5, 2), (3, 7), (7, 7), (10, 3)])
def test_every_row_comes_once_per_epoch_and_no_rollout_is_smaller(num_rows, num_prompts):
    num_rollouts = -(-num_rows // num_prompts)
    epochs = [
        [rollout_prompts(num_rows, num_prompts, epoch * num_rollouts + index, seed=3) for index in range(num_rollouts)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert {len(rollout) for rollout in epoch} == {num_prompts}
        drawn = [index for rollout in epoch for index in rollout]
        assert sorted(drawn[:num_rows]) == list(range(num_rows))
        assert set(drawn[num_rows:]) <= set(range(num_rows))  # filled up from further permutations
    assert epochs == [
        [rollout_prompts(num_rows, num_prompts, epoch * num_rollouts + index, seed=3) for index in range(num_rollouts)]
        for epoch in range(3)
    ]
    if num_rows > 4:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0][0] != rollout_prompts(num_rows, num_prompts, 0, seed=4)


def test_an_image_does_not_depend_on_the_batches(make_trainer):
    def images(**kwargs):
        kept = []

        def keep(prompts, images, **columns):
            kept.extend(np.asarray(image).astype(int) for image in images)
            return redness(prompts, images)

        make_trainer(keep, learning_rate=0.0, max_steps=2, **kwargs).train()
        return np.stack(kept)

    expected = images()
    assert expected.shape == (16, 16, 16, 3)
    assert len(np.unique(expected.reshape(16, -1), axis=0)) == 16  # no two alike
    assert np.abs(images(rollout_batch_size=3) - expected).max() <= 1
    # the same groups in one larger rollout: noise belongs to the rollout, the group and the image
    larger = images(gradient_accumulation_steps=4)
    assert np.abs(larger[:8] - expected[:8]).max() <= 1


def test_the_latents_of_a_rollout_are_gone_when_the_next_one_is_drawn(make_trainer):
    latents, lives = [], []

    def remember(prompts, images, **columns):
        lives.append([tensor() is not None for tensor in latents])
        return redness(prompts, images)

    trainer = make_trainer(reward_funcs=remember, max_steps=3)
    score = trainer._generate_and_score

    def generate_and_score(rollout_index):
        buffer = score(rollout_index)
        latents.append(weakref.ref(buffer.latents))
        return buffer

    trainer._generate_and_score = generate_and_score
    trainer.train()
    assert lives == [[], [False], [False, False]]


def test_rewards_that_are_none_are_counted_and_not_trained_on(make_trainer):
    def half(prompts, images, **columns):
        return [None if index % 2 else value for index, value in enumerate(redness(prompts, images))]

    def none(prompts, images, **columns):
        return [None] * len(images)

    trainer = make_trainer([half, none], reward_weights=[2.0, 5.0], top_k=None, gradient_accumulation_steps=4)
    trainer.train()
    log = training_logs(trainer)[0]
    assert (log["rewards/half/frac_none"], log["rewards/none/frac_none"]) == (0.5, 1.0)
    assert log["reward"] == pytest.approx(2 * log["rewards/half/mean"], rel=1e-6)
    assert "rewards/none/mean" not in log
    buffer = trainer._buffer
    assert (buffer.advantages.view(-1, 4)[:, 1::2] == 0).all() and (buffer.advantages.view(-1, 4)[:, ::2] != 0).all()


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_the_logged_reward_is_of_the_images_that_are_trained_on(make_trainer, how):
    first = [1.0, 2.0, 4.0, None, 5.0, 6.0, 8.0, 9.0]
    second = [-70.0, -20.0, -30.0, -10.0, -50.0, None, -40.0, -60.0]

    trainer = make_trainer(
        [lambda prompts, images: first, lambda prompts, images: second],
        reward_weights=[1.0, 0.1], multi_objective_aggregation=how, top_k=None, per_device_train_batch_size=4, max_steps=1,
    )  # fmt: skip
    buffers = []
    generate = trainer._generate_and_score
    trainer._generate_and_score = lambda index: buffers.append(generate(index)) or buffers[-1]
    trainer.train()
    known = [a + 0.1 * b for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    (log,) = training_logs(trainer)
    assert log["reward"] == pytest.approx(np.mean(known), abs=1e-5)
    assert log["reward_std"] == pytest.approx(np.std(known, ddof=1), abs=1e-5)
    advantages = buffers[0].advantages
    assert (advantages == 0).nonzero().flatten().tolist() == [3, 5] and advantages.sum().abs() < 1e-5


def test_equal_rewards_teach_nothing_and_are_warned_about(make_trainer, caplog):
    recorder = Recorder()
    trainer = make_trainer(lambda prompts, images, **columns: [0.1] * len(images), beta=0.0, callbacks=[recorder])
    trainer.train()
    log = training_logs(trainer)[0]
    assert (log["frac_reward_zero_std"], log["loss"], log["grad_norm"]) == (1.0, 0.0, 0.0)
    assert all(gradient.abs().max() == 0 for gradient in recorder.gradients[0].values())
    assert any("have the reward 0.1" in record.message for record in caplog.records)


def test_doubtful_settings_are_warned_about(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(noise_level=1.5, epsilon=1.0, num_iterations=2)
    text = " ".join(record.message for record in caplog.records)
    assert "`noise_level` is 1.5" in text and "`epsilon` is 1" in text and "2 groups, fewer than 8" in text
    caplog.clear()
    make_trainer(gradient_accumulation_steps=8, ratio_norm=True, epsilon=1.0, num_iterations=2)
    assert not [record for record in caplog.records if record.name.startswith("trl_spatial")]


def test_training_raises_the_reward(make_trainer):
    feed_forward = ["proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"]
    trainer = make_trainer(
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=[*TARGETS, *feed_forward]),
        num_generations=8,
        top_k=2,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        rollout_batch_size=32,
        per_device_eval_batch_size=16,
        learning_rate=3e-2,
        beta=1e-4,
        max_steps=12,
        eval_dataset=[{"prompt": prompt} for prompt in PROMPTS * 4],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    logs = training_logs(trainer)
    assert logs[-1]["reward"] > logs[0]["reward"] + 3 * logs[0]["reward_std"]
    assert after["eval_reward"] > before["eval_reward"] + 3 * before["eval_reward_std"]


# Bad input


def too_few(prompts, images, **columns):
    return [0.0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train_dataset": [{"prompt": ""}]}, ["train_dataset", "Prompt 0", "''"]),
        (
            {"train_dataset": [{"prompt": "a cat"}, {"prompt": "a cat " * 20}]},
            ["Prompt 1", "max_sequence_length", "16"],
        ),
        ({"train_dataset": [{"text": "a cat"}]}, ["train_dataset", "text", "`prompt`"]),
        ({"train_dataset": [{"prompt": "a cat"}, {"prompt": "a dog", "scene": 1}]}, ["Row 1", "scene"]),
        ({"train_dataset": iter([{"prompt": "a cat"}])}, ["train_dataset", "indexed"]),
        ({"eval_dataset": [{"prompt": " "}]}, ["eval_dataset", "Prompt 0"]),
        ({"eval_dataset": {"hard": []}}, ["eval_dataset['hard']", "empty"]),
        ({"reward_funcs": lambda prompts, images, scene: [0.0]}, ["scene", "columns"]),
        ({"reward_funcs": "redness"}, ["reward_funcs", "redness"]),
        ({"reward_weights": [1.0, 2.0]}, ["reward_weights", "1 reward functions"]),
        ({"height": 20}, ["height=20", "16 and 24"]),
        ({"eval_dataset": [{"prompt": "a cat"}], "eval_width": 12}, ["eval_width", "12"]),
        (
            {"eval_dataset": [{"prompt": "a cat"}], "metric_for_best_model": "rewards/beauty/mean"},
            ["metric_for_best_model", "rewards/beauty/mean", "rewards/redness/mean"],
        ),
        ({"peft_config": None}, ["`beta` is 0.01", "beta=0.0", "peft_config"]),
        ({"peft_config": LoraConfig(target_modules=TARGETS, lora_dropout=0.1)}, ["dropout 0.1", "lora_dropout"]),
        ({"peft_config": LoraConfig(target_modules=TARGETS, use_dora=True)}, ["use_dora", "True"]),
        ({"max_sequence_length": 600}, ["max_sequence_length", "600", "512"]),
    ],
    ids="-".join,  # of the keys, and of the words
)
def test_bad_input_is_an_error_at_the_start(make_trainer, wrong, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make_trainer(**wrong)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_pipeline_is_an_error(make_trainer, make_pipeline):
    class OtherPipeline(type(make_pipeline())):
        pass

    with pytest.raises(ValueError, match=r"OtherPipeline.*FluxPipeline"):
        make_trainer(pipeline=OtherPipeline(**make_pipeline().components))


def test_a_reward_function_that_fails_its_contract_is_an_error_that_names_it(make_trainer):
    with pytest.raises(ValueError, match=r"`too_few` returned 1 rewards for 8 images"):
        make_trainer(too_few).train()


# What a rollout knows already


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_a_rollout_in_the_batches_of_training_are_not_computed_again(
    make_trainer, make_pipeline, dtype, gradient_checkpointing
):
    # If the weights stand still, every ratio is 1: those of the second update are of the rollout itself.
    trainer = make_trainer(
        pipeline=make_pipeline(dtype),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=gradient_checkpointing,
        learning_rate=0.0,
        rollout_batch_size=2,
        steps_per_generation=6,
        num_iterations=2,
        max_steps=6,
    )
    trainer.train()
    assert {(log["ratio/mean"], log["ratio/std"]) for log in training_logs(trainer)} == {(1.0, 0.0)}
    assert training_logs(trainer)[-1]["num_old_log_prob_passes"] == 0


def test_one_bit_of_difference_and_the_old_policy_is_scored(make_trainer, make_pipeline):
    """The transformer rounds otherwise where it records a gradient."""
    pipeline = make_pipeline()
    pipeline.transformer.proj_out.register_forward_hook(
        lambda module, inputs, output: output * (1 + 1e-6 * torch.is_grad_enabled())
    )
    options = dict(rollout_batch_size=2, steps_per_generation=4, num_iterations=1, max_steps=2)
    trainer = make_trainer(pipeline=pipeline, **options)
    trainer.train()
    # 2 batches of 2 images are trained on first; the other 2 batches are scored at 2 steps
    assert training_logs(trainer)[-1]["num_old_log_prob_passes"] == 2 * 2 * 2


@pytest.mark.parametrize(("batch_size", "num_moves"), [(None, 2), (1, 4)])
def test_text_encoders_move_twice_for_many_rollouts_and_twice_for_an_evaluation(
    make_trainer, make_flux_pipeline, monkeypatch, batch_size, num_moves
):
    pipeline = make_flux_pipeline()
    prompts = [f"a red cube {number}" for number in range(20)]
    evaluation = {} if batch_size is None else {"eval_dataset": [{"prompt": f"the lamp {i}"} for i in range(5)]}
    trainer = make_trainer(
        pipeline=pipeline,
        train_dataset=[{"prompt": prompt} for prompt in prompts],
        per_device_eval_batch_size=batch_size or 8,
        eval_strategy="steps" if evaluation else "no",
        eval_steps=4,
        max_steps=5,
        **evaluation,
    )
    moves = []
    monkeypatch.setattr(pipeline.text_encoder, "to", moves.append)
    trainer.train()
    assert len(moves) == num_moves
    # no more than the run needs, of two prompts in a rollout
    assert trainer.prompt_cache.num_encoded == 5 * 2 + len(evaluation.get("eval_dataset", ()))


def test_no_more_than_32_rollouts_are_encoded_ahead(make_trainer):
    trainer = make_trainer(train_dataset=[{"prompt": f"a cube {number}"} for number in range(200)], max_steps=1)
    trainer.state.max_steps = 1000
    prompts = list(trainer._next_prompts(0))
    expected = [trainer._rollout_rows(index) for index in range(1, 32)]
    assert prompts == [row["prompt"] for rows in expected for row in rows] and len(set(prompts)) == 31 * 2
