"""DiffusionNFT: what is drawn by whom, trained on, saved and exported. Tiny FLUX pipelines on the CPU."""

import hashlib
from functools import partial

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from safetensors.torch import load_file

from tests.diffusion_grpo.conftest import LORA, PROMPTS, redness
from tests.diffusion_grpo.test_resume import StopAt, assert_same_checkpoint
from tests.diffusion_grpo.test_trainer import Recorder, scheduler_sigmas, training_logs
from trl_spatial import DiffusionGRPOConfig, DiffusionNFTConfig, DiffusionNFTTrainer
from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy
from trl_spatial.diffusion_grpo.rollout import sample_rollout
from trl_spatial.generation.seeds import image_generator


# It starts far from the reference, so that the old policy and the KL divergence are seen in the gradient.
ADAPTER = {**LORA, "lora_alpha": 64, "init_lora_weights": False}


@pytest.fixture
def make_nft_trainer(make_trainer):
    return partial(make_trainer, trainer_class=DiffusionNFTTrainer)


def digests(images):
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


class Recorded(Recorder):
    """Also keeps what is trained on, and the old policy, of every update."""

    def __init__(self):
        super().__init__()
        self.buffers, self.old_policies = [], []

    def on_pre_optimizer_step(self, *args, **kwargs):
        super().on_pre_optimizer_step(*args, **kwargs)
        self.buffers.append(self.trainer._buffer)
        self.old_policies.append({name: weight.clone() for name, weight in self.trainer.old_policy.weights.items()})


def train(make_nft_trainer, reward=redness, **kwargs):
    recorder = Recorded()
    trainer = recorder.trainer = make_nft_trainer(reward, callbacks=[recorder], **kwargs)
    trainer.train()
    return trainer, recorder


# The gradient


def paper_loss(pipeline, buffer, args, old_weights, weights, iteration):
    """
    The objective of the paper, written out in the space of images: all kept images at once. Adds its gradients, and gives its
    value and the mean KL divergence.
    """
    prompt_embeds, pooled_embeds, text_ids = pipeline.encode_prompt(buffer.prompts, max_sequence_length=16)
    num_images, sigmas = len(buffer.prompts), scheduler_sigmas(pipeline)[:-1]
    image_ids = pipeline._prepare_latent_image_ids(num_images, 2, 2, "cpu", torch.float32)
    generators = [image_generator(args.seed, 0, image, iteration, 0) for image in range(num_images)]
    levels = torch.stack([torch.randperm(3, generator=generator)[: args.num_noise_levels] for generator in generators])
    shape = (args.num_noise_levels, *buffer.latents.shape[1:])
    noises = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    losses, kls = [], []
    for k in range(args.num_noise_levels):
        t = sigmas[levels[:, k]]
        image, noise = buffer.latents, noises[:, k]
        noisy = (1 - t[:, None, None]) * image + t[:, None, None] * noise

        def predict(t=t, noisy=noisy):
            return pipeline.transformer(
                hidden_states=noisy,
                timestep=t,
                guidance=torch.full((num_images,), args.guidance_scale),
                pooled_projections=pooled_embeds,
                encoder_hidden_states=prompt_embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
            ).sample

        with torch.no_grad():
            pipeline.transformer.load_state_dict(old_weights, strict=False)
            old = predict()
            pipeline.transformer.load_state_dict(weights, strict=False)
            pipeline.transformer.disable_adapters()
            reference = predict()
            pipeline.transformer.enable_adapters()
        velocity = predict()
        optimality = (buffer.advantages / 5).clip(-1, 1) / 2 + 1 / 2
        loss = 0
        for weight, implicit in (
            (optimality, (1 - args.mixing) * old + args.mixing * velocity),
            (1 - optimality, (1 + args.mixing) * old - args.mixing * velocity),
        ):
            error = noisy - t[:, None, None] * implicit - image
            loss = loss + weight * (error**2).mean(dim=(1, 2)) / error.abs().mean(dim=(1, 2)).detach()
        kl = ((velocity - reference) ** 2).mean(dim=(1, 2))
        loss = (5 / args.mixing * loss + args.beta * kl).mean() / args.num_noise_levels
        loss.backward()
        losses.append(loss.item())
        kls.append(kl.mean().item() / args.num_noise_levels)
    return sum(losses), sum(kls)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_gradient_is_that_of_the_papers_formula(make_nft_trainer, make_pipeline, gradient_checkpointing):
    """Of two updates of a rollout: in the second one the policy is no longer the old one."""
    trainer, recorder = train(
        make_nft_trainer,
        peft_config=LoraConfig(**ADAPTER),
        num_generations=6,
        top_k=2,
        gradient_accumulation_steps=4,
        num_iterations=2,
        num_noise_levels=2,
        gradient_checkpointing=gradient_checkpointing,
        beta=0.3,
        mixing=0.5,
        max_grad_norm=0.0,
        max_steps=2,
    )
    pipeline = make_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(**ADAPTER))
    for update in range(2):
        pipeline.transformer.zero_grad()
        loss, kl = paper_loss(
            pipeline, recorder.buffers[0], trainer.args, recorder.weights[0], recorder.weights[update], update
        )
        log = training_logs(trainer)[update]
        assert log["kl"] == pytest.approx(kl, rel=1e-3) and log["kl"] > 1e-3
        assert log["loss"] == pytest.approx(loss, rel=1e-3)
        assert (log["old_policy_distance"] > 0) is (update == 1)
        expected = dict(pipeline.transformer.named_parameters())
        for name, gradient in recorder.gradients[update].items():
            size = expected[name].grad.abs().max().item()
            assert size > 0
            torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-3, atol=2e-3 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rewards_teach_nothing(make_nft_trainer, make_pipeline, dtype):
    """Exactly: the old policy is scored as the policy is."""
    _, recorder = train(
        make_nft_trainer,
        lambda prompts, images, **columns: [1.0] * len(images),
        pipeline=make_pipeline(dtype),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=True,
        beta=0.0,
        max_steps=1,
    )
    assert all(gradient.abs().max() == 0 for gradient in recorder.gradients[0].values())


@pytest.mark.parametrize(
    "batches",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"rollout_batch_size": 5},
    ],
    ids=str,
)
def test_batch_sizes_change_nothing_but_rounding(make_nft_trainer, batches):
    ours, theirs = (
        train(make_nft_trainer, max_grad_norm=0.0, max_steps=1, **kwargs)[1].gradients[0] for kwargs in (batches, {})
    )
    for name, gradient in theirs.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-3 * size)


def test_images_become_redder(make_nft_trainer):
    trainer, _ = train(make_nft_trainer, num_generations=8, top_k=None, gradient_accumulation_steps=8, max_steps=12)
    rewards = [log["reward"] for log in training_logs(trainer)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.01


# The old policy


def test_the_old_policy_is_the_average_of_the_weights_after_each_rollout(make_nft_trainer):
    trainer, recorder = train(
        make_nft_trainer, old_policy_decay=0.8, old_policy_warmup=8, num_iterations=2, max_steps=6
    )
    final = {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    after = [*recorder.weights[1:], final]  # each update
    old = recorder.weights[0]
    for update in range(6):
        for name, weight in recorder.old_policies[update].items():
            torch.testing.assert_close(weight, old[name], rtol=0, atol=1e-7)
        if update % 2:  # the last of a rollout
            decay = 0.8 * (update + 1) / 8
            old = {name: decay * old[name] + (1 - decay) * weight for name, weight in after[update].items()}
    assert any((final[name] - weight).abs().max() > 1e-3 for name, weight in trainer.old_policy.weights.items())


def test_the_optimizer_never_sees_the_old_policy(make_nft_trainer):
    trainer, _ = train(make_nft_trainer, old_policy_decay=0.9, old_policy_warmup=0)
    trained = {parameter.data_ptr() for group in trainer.optimizer.param_groups for parameter in group["params"]}
    old = trainer.old_policy.weights
    assert not trained & {weight.data_ptr() for weight in old.values()}
    assert not any(weight.requires_grad for weight in old.values())
    assert len(trained) == len(old)


@pytest.mark.parametrize("scouts", [{}, {"num_scouts": 4, "scout_steps": 3}], ids=["images", "scouts"])
def test_images_are_drawn_by_the_old_policy_without_noise(make_nft_trainer, make_pipeline, scouts):
    seen = []

    def look(prompts, images, **columns):
        seen.append((prompts, digests(images)))
        return redness(prompts, images)

    trainer, recorder = train(
        make_nft_trainer, look, old_policy_decay=0.9, old_policy_warmup=0, gradient_accumulation_steps=1, **scouts
    )
    pipeline = make_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(**LORA))
    policy = make_policy(pipeline, max_sequence_length=16)
    rounds = seen[:: 2 if scouts else 1]
    assert len(rounds) == 2
    for rollout_index, (prompts, drawn) in enumerate(rounds):
        for weights, is_drawn in (
            (recorder.old_policies[rollout_index], True),
            (recorder.weights[rollout_index], False),
        ):
            pipeline.transformer.load_state_dict(weights, strict=False)
            rollout = sample_rollout(
                policy,
                pipeline.transformer,
                policy.encode_prompt(prompts),
                [image_generator(trainer.args.seed, rollout_index, 0, image) for image in range(4)],
                SamplingOptions(16, 16, 3, trainer.args.guidance_scale),
                sigmas=scheduler_sigmas(pipeline),
                trained_steps=(),
                noise_level=0.0,
                dynamics="flow_sde",
                batch_size=4,
            )
            assert (digests(rollout.images) == drawn) is (is_drawn or rollout_index == 0)
    if scouts:  # of as many steps as the images, which they therefore foretell
        assert [log["scout_rank_correlation"] for log in training_logs(trainer)] == pytest.approx([1.0, 1.0])


# The cost


def test_what_is_counted(make_nft_trainer):
    trainer, _ = train(make_nft_trainer, num_scouts=8, scout_steps=1, num_noise_levels=2)
    log = training_logs(trainer)[-1]
    assert (log["num_scout_images"], log["num_images"], log["num_trained_images"]) == (32, 8, 8)
    assert log["num_policy_passes"] == 32 + 8 * 3 + 8 * 2 * 2
    assert log["num_reference_passes"] == log["num_old_policy_passes"] == 8 * 2
    assert log["velocity_ratio"] == pytest.approx(1, abs=0.3)


def test_noise_levels_are_all_but_one_of_the_samplers(make_nft_trainer):
    trainer, recorder = train(make_nft_trainer, max_steps=1)
    steps = recorder.buffers[0].batch_steps(0, trainer.prompt_cache)
    assert len(steps) == 2
    sigmas = torch.stack([step.sigmas for step in steps])  # (num_levels, batch_size)
    assert all(len(set(column)) == 2 for column in sigmas.T.tolist())
    assert set(sigmas.flatten().tolist()) <= set(trainer._sigmas[:-1].tolist())
    for step in steps:  # the images can be computed from what the loss gets
        images = step.latents - step.sigmas[:, None, None] * step.targets
        torch.testing.assert_close(images, recorder.buffers[0].latents[:2], rtol=0, atol=1e-5)


# What is left on disk


CASES = {
    "one update per rollout": {},
    "in the middle of a rollout, with scouts": {
        "num_iterations": 2,
        "num_scouts": 6,
        "scout_steps": 1,
        "max_steps": 6,
    },
    "full fine-tuning": {"peft_config": None, "beta": 0.0, "learning_rate": 1e-4},
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_training_goes_on_bit_for_bit(make_nft_trainer, tmp_path, case):
    kwargs = {"max_steps": 4, "ema_decay": 0.9, "old_policy_warmup": 3, "save_strategy": "steps", **CASES[case]}
    end, middle = kwargs["max_steps"], kwargs["max_steps"] // 2
    runs = {name: str(tmp_path / name) for name in ("whole", "parts")}

    def make(name, **more):
        trainer = make_nft_trainer(**(kwargs | more))
        trainer.args.output_dir = runs[name]
        return trainer

    make("whole", save_steps=end).train()
    make("parts", save_steps=middle, callbacks=[StopAt(middle)]).train()
    make("parts", save_steps=middle).train(resume_from_checkpoint=True)
    ours, theirs = (tmp_path / name / f"checkpoint-{end}" for name in ("parts", "whole"))
    assert_same_checkpoint(ours, theirs)
    assert (ours / "old_policy.safetensors").is_file()
    old, trained = (load_file(ours / f"{name}.safetensors") for name in ("old_policy", "trained_weights"))
    assert old.keys() == trained.keys() and any((old[name] != trained[name]).any() for name in old)


@pytest.mark.parametrize(("name", "value"), [("num_noise_levels", 2), ("num_inference_steps", 4)])
def test_noise_levels_cannot_change_in_the_middle_of_a_rollout(make_nft_trainer, name, value):
    """Each image has its own already; at the end of a rollout they can."""
    kwargs = {"num_iterations": 2, "num_noise_levels": 1, "save_strategy": "steps", "save_steps": 1}
    make_nft_trainer(max_steps=1, **kwargs).train()
    changed = kwargs | {name: value}
    with pytest.raises(ValueError, match=f"middle of a rollout that was drawn with `{name}` .; now it is {value}"):
        make_nft_trainer(max_steps=2, **changed).train(resume_from_checkpoint=True)
    make_nft_trainer(max_steps=2, **kwargs).train(resume_from_checkpoint=True)
    trainer = make_nft_trainer(max_steps=3, **changed)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_plain_diffusers_loads_what_was_trained(make_nft_trainer, make_flux_pipeline, tmp_path):
    base = make_flux_pipeline()
    trainer, _ = train(make_nft_trainer, pipeline=make_flux_pipeline(), max_steps=3, old_policy_decay=0.9)
    trainer.save_model(tmp_path / "saved")
    assert not any("old" in name for name in load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors"))
    base.save_pretrained(tmp_path / "base")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "base")
    options = SamplingOptions(16, 16, 3, 3.5)

    def velocity(pipeline):
        policy = make_policy(pipeline, max_sequence_length=16)
        latents = policy.prepare_latents([image_generator(0)], options)
        with torch.no_grad():
            return policy.predict_velocity(
                policy.transformer, latents, torch.tensor(0.7), policy.encode_prompt(PROMPTS[:1]), options
            )

    untrained = velocity(pipeline)
    pipeline.load_lora_weights(tmp_path / "saved")
    ours, theirs = velocity(trainer.policy.pipeline), velocity(pipeline)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - untrained).abs().max() > 1e-2


def test_the_card_names_the_method(make_nft_trainer, tmp_path):
    trainer, _ = train(make_nft_trainer, max_steps=1)
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "[DiffusionNFT](https://huggingface.co/papers/2509.16117)" in card and "GRPO" not in card
    assert "| trained noise levels | 2 of 3 |" in card and "diffusion-nft" in card


# Wrong input


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_noise_levels": 0},
        {"num_noise_levels": 7},
        *({"mixing": value} for value in (0.0, -1.0, float("nan"), float("inf"))),
        *({"old_policy_decay": value} for value in (1.0, -0.1, float("nan"))),
        {"old_policy_warmup": -1},
        {"num_inference_steps": 0},
    ],
    ids=str,
)
def test_an_invalid_field_is_named_with_its_value(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        DiffusionNFTConfig(str(tmp_path), use_cpu=True, **wrong)


def test_a_configuration_of_another_trainer_is_refused(make_pipeline, tmp_path):
    args = DiffusionGRPOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="must be a `DiffusionNFTConfig`, got `DiffusionGRPOConfig`"):
        DiffusionNFTTrainer(make_pipeline(), redness, args)


def test_few_prompts_are_warned_about(make_nft_trainer, caplog):
    make_nft_trainer()
    assert "An update sees 2 groups" in caplog.text


def test_trained_levels_have_a_default(tmp_path):
    for num_steps, num_levels in ((6, 5), (2, 1), (1, 1)):
        args = DiffusionNFTConfig(str(tmp_path), use_cpu=True, num_inference_steps=num_steps)
        assert args.num_trained_levels == num_levels
