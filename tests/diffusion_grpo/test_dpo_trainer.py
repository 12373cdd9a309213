"""Offline preference training on tiny pipelines: what is trained on, the update, resuming, and what it leaves for users."""

import dataclasses
import inspect
import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import FluxPipeline
from peft import LoraConfig
from PIL import ExifTags, Image
from safetensors.torch import load_file
from trl import DPOTrainer

from tests.diffusion_grpo.families import FAMILIES, GUIDED
from tests.diffusion_grpo.test_resume import StopAt, assert_same_checkpoint, redness
from tests.launching import REPOSITORY, run_processes
from trl_spatial import DiffusionDPOConfig, DiffusionDPOTrainer
from trl_spatial.diffusion_grpo import attention_lora_config
from trl_spatial.diffusion_grpo.dpo.pairs import PreferencePairs
from trl_spatial.diffusion_grpo.policies import make_policy
from trl_spatial.diffusion_grpo.rollout import sample_rollout
from trl_spatial.diffusion_grpo.runtime.checkpointing import TRAINED_WEIGHTS
from trl_spatial.generation.seeds import image_generator


LORA = LoraConfig(r=2, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_v"])
PROMPTS = ["a red cube", "a blue sphere", "a lamp", "a table", "a dog", "a cat", "a small lamp"]
TINY = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    eval_num_inference_steps=3,
    height=16,
    width=16,
    max_sequence_length=16,
    learning_rate=1e-2,
    lr_scheduler_type="linear",
    ema_steps=2,
    gradient_checkpointing=False,
    max_steps=4,  # of 7 pairs, which is no whole number of updates
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)


def make_image(red, seed=0, size=(16, 16)):
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    color = np.array([200, 60, 60]) if red else np.array([60, 60, 200])
    return Image.fromarray((color + noise).clip(0, 255).astype(np.uint8))


def make_rows(num_rows=7, **columns):
    return [
        {
            "prompt": PROMPTS[row % len(PROMPTS)],
            "chosen": make_image(True, row),
            "rejected": make_image(False, row),
            **{name: values[row] for name, values in columns.items()},
        }
        for row in range(num_rows)
    ]


def build_trainer(pipeline, folder, *, rows=None, peft_config=LORA, **kwargs):
    own = {name: kwargs.pop(name) for name in ("callbacks", "eval_dataset", "eval_reward_funcs") if name in kwargs}
    return DiffusionDPOTrainer(
        pipeline,
        DiffusionDPOConfig(str(folder), **(TINY | kwargs)),
        train_dataset=make_rows() if rows is None else rows,
        peft_config=peft_config,
        **own,
    )


@pytest.fixture
def make_trainer(make_flux_pipeline, tmp_path):
    return lambda folder="run", **kwargs: build_trainer(make_flux_pipeline(), tmp_path / folder, **kwargs)


def training_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- what is trained on


def recipe(seed, **changes):
    facts = {"pipeline": "FluxPipeline", "width": 16, "height": 16, "torch_seed": seed, "generator_device": "cpu"}
    return json.dumps(facts | changes)


def test_pairs_are_the_same_from_a_list_and_from_a_dataset(options):
    rows = make_rows(3)
    features = Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()})
    stored = Dataset.from_list(
        [row | {name: {"bytes": png(row[name]), "path": None} for name in ("chosen", "rejected")} for row in rows],
        features=features,
    )
    pairs = PreferencePairs(rows, "FluxPipeline", options)
    for ours, theirs in zip(pairs, PreferencePairs(stored, "FluxPipeline", options), strict=True):
        assert ours["prompt"] == theirs["prompt"] and ours["row"] == theirs["row"]
        for column in ("chosen", "rejected"):
            assert ours[column].size == (options.width, options.height)
            assert ours[column].tobytes() == theirs[column].tobytes()


def batch_of(trainer, *rows):
    return trainer._prepare_inputs([trainer.train_dataset[row] for row in rows])


def test_a_batch_is_image_and_noise_at_one_level_of_the_sampler(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer, 2, 5)
    images = [row[column] for column in ("chosen", "rejected") for row in (make_rows()[2], make_rows()[5])]
    clean = trainer.policy.encode_images(images)
    noise = batch.targets + clean
    sigmas = batch.sigmas[:, None, None]
    torch.testing.assert_close(batch.latents, (1 - sigmas) * clean + sigmas * noise)
    assert batch.sigmas[:2].equal(batch.sigmas[2:])
    visited = trainer.policy.prepare_sigmas(trainer._options)
    assert all((visited[:-1] == sigma).any() for sigma in batch.sigmas)
    # the images of a pair share their noise, which is the row's, and standard normal
    torch.testing.assert_close(noise[:2], noise[2:])
    torch.testing.assert_close(noise[1:2], trainer.policy.prepare_latents([image_generator(42, 5)], trainer._options))
    # alone, a pair is what it is in a batch
    torch.testing.assert_close(batch_of(trainer, 5).latents, batch.latents[[1, 3]])


def test_noise_stays_while_its_level_changes(make_trainer):
    trainer = make_trainer(eval_num_inference_steps=20)
    seen = []
    for step in range(12):
        trainer.state.global_step = step
        batch = batch_of(trainer, 0)
        seen.append(batch.sigmas[0].item())
        if step == 0:
            first = batch.targets
        assert batch.targets.equal(first)
    assert len(set(seen)) > 6
    trainer.state.global_step = 0
    assert batch_of(trainer, 0).sigmas[0].item() == seen[0]
    assert len({batch_of(trainer, row).sigmas[0].item() for row in range(7)}) > 3


def test_the_noise_is_what_the_image_was_drawn_from_if_that_is_known(make_trainer):
    def noise_of(recipes):
        rows = make_rows(1, chosen_recipe=[recipes[0]], rejected_recipe=[recipes[1]])
        trainer = make_trainer(rows=rows)
        batch = batch_of(trainer, 0)
        return trainer, batch.targets + trainer.policy.encode_images([rows[0]["chosen"], rows[0]["rejected"]])

    trainer, noise = noise_of([recipe(11), recipe(12)])
    drawn = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    torch.testing.assert_close(noise, trainer.policy.prepare_latents(drawn, trainer._options))
    unknown = [
        recipe(11, pipeline="QwenImagePipeline"),
        recipe(11, width=32),
        recipe(11, generator_device="cuda"),
        None,
    ]
    for other in unknown:
        trainer, noise = noise_of([recipe(11), other])
        own = trainer.policy.prepare_latents([image_generator(42, 0)] * 1, trainer._options)
        torch.testing.assert_close(noise, own.expand(2, -1, -1))


@pytest.mark.parametrize(
    "facts",
    ["drawn by hand", "[1]", "[" * 100_000, recipe("11"), recipe(True), recipe(2**64), recipe(-(2**63) - 1), 5],
)
def test_a_recipe_that_says_nothing_of_the_noise_is_named(options, facts):
    rows = make_rows(2)
    rows[0] |= {"chosen_recipe": recipe(1), "rejected_recipe": None}
    rows[1] |= {"chosen_recipe": recipe(1), "rejected_recipe": facts}
    with pytest.raises(
        ValueError, match=r"`train_dataset`, row 1, `rejected_recipe`: .* does not say what drew the image"
    ):
        PreferencePairs(rows, "FluxPipeline", options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rejected": None}, r"`train_dataset`, row 1, `rejected`: .* is missing.* Repair or remove the row"),
        ({"rejected": make_image(True, 1)}, r"row 1, `rejected`: .* shows the chosen image"),
        ({"prompt": " "}, r"`train_dataset`: Prompt 1 is ' '"),
        ({"prompt": "a lamp " * 20}, r"`train_dataset`: Prompt 1, .* has .* tokens; .*`max_sequence_length=16`"),
        ({"chosen": make_image(True, size=(32, 16))}, r"row 1, `chosen`: .* has 32x16 pixels, another shape than the 16x16"),
    ],
    ids=["missing", "same image", "no prompt", "long prompt", "another shape"],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on_is_named(make_trainer, changed, message):
    rows = make_rows(3)
    rows[1] = rows[1] | changed
    with pytest.raises(ValueError, match=message):
        make_trainer(rows=rows)


def test_an_image_is_upright_before_its_shape_counts(tmp_path, options):
    """Of 32 x 16 pixels as it is stored, and by its EXIF orientation of 16 x 32."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    make_image(True, size=(32, 16)).save(tmp_path / "turned.png", exif=exif)
    rows = [{"prompt": "a lamp", "chosen": str(tmp_path / "turned.png"), "rejected": make_image(False, size=(16, 32))}]
    upright = PreferencePairs(rows, "FluxPipeline", dataclasses.replace(options, height=32, width=16))
    assert upright[0]["chosen"].size == (16, 32)
    rows[0]["rejected"] = make_image(False, size=(32, 16))
    lying = PreferencePairs(rows, "FluxPipeline", dataclasses.replace(options, height=16, width=32))
    with pytest.raises(ValueError, match=r"row 0, `chosen`: .* has 16x32 pixels, another shape than the 32x16"):
        lying[0]


def test_wrong_datasets_and_settings_are_errors(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(rows=[])
    with pytest.raises(TypeError, match="cannot be indexed"):
        make_trainer(rows=iter([]))
    with pytest.raises(ValueError, match="`rejected`"):
        make_trainer(rows=[{"prompt": "a lamp", "chosen": make_image(True)}])
    with pytest.raises(ValueError, match=r"Train LoRA with `peft_config`"):
        make_trainer(peft_config=None)
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"`beta` is .*Use a positive number, such as 2000"):
            DiffusionDPOConfig(str(tmp_path), beta=value, use_cpu=True)


# ---------------------------------------------------------------------------------------------------- the update


def test_an_update_is_a_step_along_the_gradient_of_the_written_out_loss(make_flux_pipeline, tmp_path):
    beta, rate = 50.0, 1e-2
    pipeline = make_flux_pipeline()
    settings = dict(beta=beta, max_steps=2, optim="sgd", learning_rate=rate, lr_scheduler_type="constant", ema_decay=0.0,
                    weight_decay=0.0, max_grad_norm=0.0, save_strategy="no", gradient_accumulation_steps=1,
                    per_device_train_batch_size=7)  # fmt: skip
    trainer = build_trainer(pipeline, tmp_path / "run", **settings)
    policy, options = trainer.policy, trainer._options
    transformer = pipeline.transformer
    weights = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    expected, rows = start, make_rows()
    embeds = policy.encode_prompt([row["prompt"] for row in rows])
    clean = {column: policy.encode_images([row[column] for row in rows]) for column in ("chosen", "rejected")}
    noise = policy.prepare_latents([image_generator(42, row) for row in range(7)], options)
    visited = policy.prepare_sigmas(options)[:-1]
    transformer.train()
    for step in range(2):
        draws = [int(torch.randint(3, (), generator=image_generator(42, row, step))) for row in range(7)]
        sigmas = visited[draws]

        def errors(column, sigmas=sigmas):
            mixed = (1 - sigmas[:, None, None]) * clean[column] + sigmas[:, None, None] * noise
            velocity = policy.predict_velocity(transformer, mixed, sigmas, embeds, options)
            return ((velocity - (noise - clean[column])) ** 2).mean(dim=(1, 2))

        for name, weight in weights.items():
            weight.data.copy_(expected[name])
        transformer.disable_adapters()
        with torch.no_grad():
            reference = errors("chosen") - errors("rejected")
        transformer.enable_adapters()
        loss = -torch.nn.functional.logsigmoid(-beta / 2 * (errors("chosen") - errors("rejected") - reference)).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        expected = {name: expected[name] - rate * gradient for name, gradient in zip(weights, gradients, strict=True)}
    for name, weight in weights.items():  # back to the start, and through the trainer
        weight.data.copy_(start[name])
    trainer.train()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.data, expected[name], rtol=0, atol=1e-6)
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in weights)
    assert training_logs(trainer)[-1]["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_logs_have_trls_names_and_count_passes(make_trainer):
    trainer = make_trainer(gradient_checkpointing=True, num_train_epochs=2, max_steps=-1, save_strategy="no")
    trainer.train()
    first, *_, last = training_logs(trainer)
    source = inspect.getsource(DPOTrainer)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert f'"{name}"' in source and name in first
    # The adapters start at nothing
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) or first["step"] > 1
    assert first["velocity_ratio"] == pytest.approx(1, abs=1e-3)
    assert (last["num_images"], last["num_trained_images"]) == (0, 2 * 2 * 7)  # none is drawn
    assert (last["num_policy_passes"], last["num_reference_passes"]) == (3 * 28, 28)
    assert last["passes_per_trained_image"] == 4
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], rel=1e-4)
    assert {"time/encode", "time/train"} <= set(last)


def test_every_pair_of_an_update_counts_alike(make_trainer):
    # 7 pairs in batches of 2: the last update of the epoch is of three
    trainer = make_trainer(max_steps=-1, num_train_epochs=1, save_strategy="no", learning_rate=0.0)
    trainer.train()
    assert len(training_logs(trainer)) == 2
    for log in training_logs(trainer):
        assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_unused_columns_may_be_removed(make_trainer):
    kept, removed = (
        make_trainer(remove_unused_columns=flag, max_steps=1, save_strategy="no") for flag in (False, True)
    )
    for trainer in (kept, removed):
        trainer.train()
    assert training_logs(kept)[0]["grad_norm"] == training_logs(removed)[0]["grad_norm"]


def test_text_encoders_work_once_per_update(make_trainer):
    """For a GPU they are fetched from the host, which takes longer than to encode."""
    trainer = make_trainer(max_steps=2, save_strategy="no")
    fetched, move = [], trainer.prompt_cache._move_encoders
    trainer.prompt_cache._move_encoders = lambda device: (fetched.append(trainer.state.global_step), move(device))
    trainer.train()
    assert fetched == [0, 0, 1, 1]  # there and back


@pytest.mark.parametrize("name", GUIDED)
def test_images_move_towards_the_preferred_ones_in_every_family(name, tmp_path):
    family = FAMILIES[name]
    rows = [row | {side: row[side].resize((32, 32)) for side in ("chosen", "rejected")} for row in make_rows()]
    trainer = build_trainer(
        family.build(), tmp_path / "run", peft_config=attention_lora_config(rank=4, alpha=8), max_steps=12, beta=50.0,
        ema_decay=0.0, save_strategy="no", height=32, width=32, eval_num_inference_steps=4, lr_scheduler_type="constant",
        rows=rows, **family.guidance,
    )  # fmt: skip
    policy, options = trainer.policy, trainer._options
    assert policy.num_passes(options) == 1  # without classifier-free guidance
    chosen, rejected = (policy.encode_images([row[side] for row in rows]).mean(0) for side in ("chosen", "rejected"))

    def preference():
        """How far images are on the way from the rejected ones (0) to the chosen ones (1)."""
        latents = sample_rollout(
            policy, policy.transformer, policy.encode_prompt(PROMPTS), [image_generator(9, row) for row in range(7)], options,
            sigmas=policy.prepare_sigmas(options), trained_steps=(), noise_level=0.0, dynamics="flow_sde", batch_size=7,
        ).final_latents.mean(0)  # fmt: skip
        direction = chosen - rejected
        return (((latents - rejected) * direction).sum() / direction.square().sum()).item()

    before = preference()
    trainer.train()
    logs = training_logs(trainer)
    assert logs[-1]["rewards/accuracies"] > 0.7 and logs[-1]["loss"] < logs[0]["loss"] - 0.05
    assert preference() > before + 0.2


# ---------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("stop_at", [1, 3])  # in an epoch, and in the next one
def test_a_resumed_run_is_the_whole_run_bit_for_bit(make_trainer, tmp_path, stop_at):
    make_trainer("whole", save_steps=1).train()
    make_trainer("parts", save_steps=1, callbacks=[StopAt(stop_at)]).train()
    make_trainer("parts", save_steps=1).train(resume_from_checkpoint=True)
    assert_same_checkpoint(tmp_path / "parts" / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")


def test_other_noise_levels_of_a_resumed_run_are_on_its_card(make_trainer, tmp_path, caplog):
    make_trainer(save_steps=2, max_steps=2).train()
    make_trainer(save_steps=2, eval_num_inference_steps=5).train(resume_from_checkpoint=True)
    assert "`eval_num_inference_steps` is 5 from update 2 on" in caplog.text
    card = (tmp_path / "run" / "checkpoint-4" / "README.md").read_text()
    assert "| eval_num_inference_steps until update 2 | 3 |" in card


def test_two_processes_train_as_one_and_resume(make_trainer, tmp_path):
    run_processes([REPOSITORY / "tests" / "diffusion_grpo" / "dpo_worker.py", tmp_path])
    assert_same_checkpoint(tmp_path / "parts" / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")
    make_trainer("one", rows=make_rows(8), per_device_train_batch_size=2, save_steps=1).train()
    for step in (1, 4):
        ours, theirs = (
            load_file(tmp_path / folder / f"checkpoint-{step}" / TRAINED_WEIGHTS) for folder in ("whole", "one")
        )
        for name, weight in theirs.items():  # gradients are added up in another order
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-6 if step == 1 else 2e-4)
    logs = [
        json.loads((tmp_path / folder / "checkpoint-4" / "trainer_state.json").read_text())
        for folder in ("whole", "one")
    ]
    ours, theirs = (log["log_history"][-1] for log in logs)
    assert ours["num_trained_images"] == theirs["num_trained_images"] == 32
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def test_plain_diffusers_loads_what_was_learned(make_trainer, make_flux_pipeline, tmp_path):
    trainer = make_trainer(ema_decay=0.0)
    trainer.train()
    trainer.save_model()
    pipeline = make_flux_pipeline()
    options = dict(height=16, width=16, num_inference_steps=3, guidance_scale=3.5, max_sequence_length=16)

    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(["a lamp"], generator=generator, output_type="latent", **options).images

    base = draw(pipeline)
    FluxPipeline.load_lora_weights(pipeline, tmp_path / "run")
    trained = draw(trainer.policy.pipeline)
    torch.testing.assert_close(draw(pipeline), trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, trained, atol=1e-2)
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        "diffusion-dpo" in card and "| preference strength (beta) | 2000.0 |" in card and "DiffusionDPOTrainer" in card
    )


def test_evaluation_draws_images_for_a_judge(make_trainer):
    prompts = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    trainer = make_trainer(eval_dataset=prompts, eval_reward_funcs=redness, eval_strategy="steps", eval_steps=2)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 2
    assert evaluations[0]["eval_reward"] == evaluations[0]["eval_rewards/redness/mean"]
    with pytest.raises(ValueError, match="prompts of `eval_dataset`, but there is no reward function"):
        make_trainer(eval_dataset=prompts)


def test_policy_of_other_trainings_is_trained_further(make_flux_pipeline, tmp_path):
    """The reference is always the transformer without adapters, also where these have been trained before."""
    trainer = build_trainer(make_flux_pipeline(), tmp_path / "first")
    trainer.train()
    trainer.save_model()
    pipeline = make_flux_pipeline()
    pipeline.load_lora_weights(tmp_path / "first")
    second = build_trainer(pipeline, tmp_path / "second", peft_config=None, max_steps=1)
    second.train()
    assert training_logs(second)[0]["velocity_ratio"] != 1.0
    assert make_policy(pipeline, max_sequence_length=16).transformer is second.policy.transformer
