"""What surrounds the algorithm: averaged weights, evaluation, the best checkpoint, images, logs, the progress bar."""

import json
import re
import time

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_spatial.statistics import bootstrap_interval
from trl_spatial.store import is_complete


PROMPTS = ["a red cube", "a cat", "the lamp"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def redness(prompts, images, **columns):
    pixels = [np.asarray(image).astype(float) / 255 for image in images]
    return [float(image[..., 0].mean() - image[..., 1:].mean()) for image in pixels]


def blueness(prompts, images, **columns):
    pixels = [np.asarray(image).astype(float) / 255 for image in images]
    return [float(image[..., 2].mean()) for image in pixels]


def adapter_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


class TestEvaluation:
    def test_judges_the_averaged_weights(self, make_trainer):
        history = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                history.append(adapter_weights(trainer))

        trainer = make_trainer(
            eval_dataset=ROWS, callbacks=[Watch()], ema_decay=0.5, ema_steps=2, learning_rate=3e-2, max_steps=5
        )
        start = adapter_weights(trainer)
        trainer.train()
        # By hand: after updates 2 and 4. The decay warms up: min(0.5, (1 + n) / (10 + n)).
        average = start
        for number in (2, 4):
            decay = min(0.5, (1 + number) / (10 + number))
            average = {name: decay * average[name] + (1 - decay) * history[number - 1][name] for name in average}
        trained = adapter_weights(trainer)
        averaged = trainer.evaluate()["eval_reward"]
        assert all(torch.equal(trained[name], weight) for name, weight in adapter_weights(trainer).items())
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(average[name])
        trainer.ema = None
        assert trainer.evaluate()["eval_reward"] == pytest.approx(averaged, abs=1e-5)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(trained[name])
        assert trainer.evaluate()["eval_reward"] != pytest.approx(averaged, abs=1e-5)

    def test_before_the_average_is_updated_the_trained_weights_are_what_was_learned(self, make_trainer, tmp_path):
        """A training of few updates would export its start."""
        trainer = make_trainer(eval_dataset=ROWS, ema_decay=0.9, ema_steps=3, learning_rate=3e-2, max_steps=2)
        trainer.train()
        averaged = trainer.evaluate()["eval_reward"]
        trainer.save_model()
        exported = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
        assert all(weight.any() for name, weight in exported.items() if "lora_B" in name)
        assert "moving average" not in (tmp_path / "run" / "README.md").read_text()
        trainer.ema = None
        assert trainer.evaluate()["eval_reward"] == averaged
        trainer.save_model()
        again = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
        assert all(torch.equal(exported[name], weight) for name, weight in again.items())

    def test_held_out_rewards_are_not_trained_on(self, make_trainer):
        calls = []

        def spoken(prompts, images, **columns):
            calls.append(len(images))
            return blueness(prompts, images)

        trainer = make_trainer(eval_dataset=ROWS, eval_reward_funcs=[spoken], reward_weights=[3.0])
        trainer.train()
        assert calls == []
        metrics = trainer.evaluate()
        assert sum(calls) == len(ROWS)
        assert metrics["eval_reward"] == pytest.approx(3 * metrics["eval_rewards/redness/mean"])
        assert 0 < metrics["eval_rewards/spoken/mean"] < 1

    def test_an_image_without_a_trained_reward_is_left_out(self, make_trainer):
        def partial(prompts, images, **columns):
            return [None if prompt == PROMPTS[0] else 1.0 for prompt in prompts]

        metrics = make_trainer(partial, eval_dataset=ROWS, eval_reward_funcs=blueness).evaluate()
        assert metrics["eval_reward"] == 1.0
        assert metrics["eval_rewards/partial/frac_none"] == pytest.approx(1 / 3)

    def test_means_have_the_interval_of_evaluation_over_prompts(self, make_trainer):
        rows = ROWS * 2  # of two images of a prompt, a judge says the same

        def judge(prompts, images, **columns):
            return [float(PROMPTS.index(prompt)) for prompt in prompts]

        trainer = make_trainer(eval_dataset=rows, eval_reward_funcs=judge)
        metrics, found = trainer.evaluate(), trainer.predict(rows).predictions
        for prefix, values in (
            ("eval_rewards/judge/", found[:, 1]),
            ("eval_rewards/redness/", found[:, 0]),
            ("eval_reward_", found[:, 0]),
        ):
            rng = np.random.default_rng(0)
            expected = bootstrap_interval(values.astype(float), [row["prompt"] for row in rows], rng=rng)
            assert [metrics[f"{prefix}{end}"] for end in ("low", "high")] == pytest.approx(
                [expected.low, expected.high], abs=1e-4
            )
        assert metrics["eval_rewards/judge/low"] == 0 and metrics["eval_rewards/judge/high"] == 2
        metrics = trainer.evaluate(ROWS[:1] * 2)
        assert "eval_reward" in metrics and not [name for name in metrics if name.endswith(("low", "high"))]

    def test_is_the_same_every_time(self, make_trainer):
        trainer = make_trainer(eval_dataset=ROWS, eval_reward_funcs=blueness)
        state = torch.get_rng_state()

        def metrics():
            return {name: value for name, value in trainer.evaluate().items() if "/" in name}

        first = metrics()
        assert metrics() == first
        assert torch.equal(torch.get_rng_state(), state)
        trainer.args.per_device_eval_batch_size = 1
        assert metrics() == pytest.approx(first, abs=1e-3)

    def test_predict_gives_the_rewards_of_every_image(self, make_trainer):
        trainer = make_trainer(eval_dataset=ROWS, eval_reward_funcs=blueness)
        predictions, labels, metrics = trainer.predict(ROWS)
        assert predictions.shape == (3, 2) and labels is None
        assert metrics["test_reward"] == pytest.approx(predictions[:, 0].mean())
        assert metrics["test_reward"] == trainer.evaluate()["eval_reward"]

    def test_several_datasets(self, make_trainer):
        trainer = make_trainer(
            eval_dataset={"one": ROWS[:1], "two": ROWS[1:]},
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="two_reward",
        )
        trainer.train()
        assert {"eval_one_reward", "eval_two_rewards/redness/mean"} <= trainer.evaluate().keys()
        assert trainer.state.best_metric is not None

    def test_uses_sizes_and_steps_of_its_own(self, make_trainer):
        sizes = []

        def look(prompts, images, **columns):
            sizes.extend(image.size for image in images)
            return [0.0] * len(images)

        trainer = make_trainer(
            eval_dataset=ROWS,
            eval_reward_funcs=look,
            eval_height=24,
            eval_width=32,
            eval_num_inference_steps=5,
            rollout_batch_size=16,
        )
        steps = []
        trainer.model.register_forward_hook(lambda module, args, output: steps.append(1))
        trainer.evaluate()
        assert sizes == [(32, 24)] * 3
        assert len(steps) == 5

    def test_batches_have_no_more_pixels_than_the_rollouts(self, make_trainer):
        calls = []

        def look(prompts, images, **columns):
            calls.append(len(images))
            return [0.0] * len(images)

        trainer = make_trainer(
            eval_dataset=ROWS, eval_reward_funcs=look, rollout_batch_size=4, height=16, width=16, eval_height=32
        )
        assert trainer.args.per_device_eval_batch_size == 8
        trainer.evaluate()
        assert calls == [2, 1]

    def test_hacking_is_warned_about(self, make_trainer, caplog):
        trainer = make_trainer(eval_dataset=ROWS * 3, eval_reward_funcs=blueness)
        for number in range(3):
            trainer.eval_reward_functions.functions = [
                lambda prompts, images, number=number: [value + number for value in redness(prompts, images)],
                lambda prompts, images, number=number: [value - number for value in blueness(prompts, images)],
            ]
            trainer.state.global_step = number
            assert "held-out" not in caplog.text
            trainer.evaluate()
        assert "held-out reward `blueness` fell" in caplog.text and "raise `beta`" in caplog.text

    def test_without_a_dataset_is_an_error(self, make_trainer):
        with pytest.raises(ValueError, match="`eval_dataset` is `None`"):
            make_trainer().evaluate()


class TestBestCheckpoint:
    # The reward of evaluation by update, whatever the images are
    VALUES = [0.1, 0.5, 0.3, 0.2]

    @pytest.fixture
    def run(self, make_trainer):
        def run(**kwargs):
            def staged(prompts, images, **columns):
                is_evaluation = len(images) == len(ROWS)
                value = self.VALUES[trainer.state.global_step - 1] if is_evaluation else 0.0
                return [value + 1e-3 * reward for reward in redness(prompts, images)]

            trainer = make_trainer(
                staged, eval_dataset=ROWS, eval_strategy="steps", eval_steps=1, max_steps=4, ema_decay=0.5, **kwargs
            )
            trainer.train()
            return trainer

        return run

    def test_is_kept_when_others_go(self, run, tmp_path):
        trainer = run(save_strategy="steps", save_steps=1, save_total_limit=1)
        left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert left == ["checkpoint-2"]
        assert trainer.state.best_metric == pytest.approx(0.5, abs=1e-3)
        assert is_complete(tmp_path / "run" / "checkpoint-2")

    def test_is_saved_between_the_regular_ones(self, run, tmp_path):
        run(save_strategy="steps", save_steps=3, save_total_limit=2)
        left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert left == ["checkpoint-2", "checkpoint-4"]
        state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"].endswith("checkpoint-2")

    def test_is_loaded_at_the_end_if_wanted(self, run, tmp_path):
        trainer = run(save_strategy="steps", save_steps=1, load_best_model_at_end=True)
        folder = tmp_path / "run" / "checkpoint-2"
        best, average = load_file(folder / "trained_weights.safetensors"), load_file(folder / "ema.safetensors")
        assert all(torch.equal(best[name], weight) for name, weight in adapter_weights(trainer).items())
        assert all(torch.equal(average[name], weight) for name, weight in trainer.ema.weights.items())


def test_nothing_that_is_exported_is_a_pickle(make_trainer, tmp_path):
    trainer = make_trainer(logging_strategy="no")
    trainer.train()
    trainer.save_model()
    files = [path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")]
    weights = {"pytorch_lora_weights.safetensors", "card.json", "README.md"}
    assert set(files) == weights | {"run.json", "checkpoint.json", ".lock"}


def test_a_pipeline_is_loaded_from_a_folder(make_trainer, flux_folder):
    trainer = make_trainer(pipeline=str(flux_folder), max_steps=1)
    trainer.train()
    assert isinstance(trainer.policy.pipeline, FluxPipeline)
    assert trainer.state.log_history[0]["ratio/mean"] == 1.0
    trainer = make_trainer(pipeline=str(flux_folder), bf16=True)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16, torch.float32}


def test_image_grids_are_saved(make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset=ROWS, eval_strategy="steps", eval_steps=1, max_steps=11)
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "run" / "images").iterdir())
    grids = [f"eval_{step:06d}.png" for step in range(1, 12)]
    assert files == [*grids, "rollout_000000.png", "rollout_000010.png"]
    wide, narrow = (
        Image.open(tmp_path / "run" / "images" / name).size for name in ("rollout_000000.png", "eval_000001.png")
    )
    assert wide[0] > narrow[0] > 3 * 200  # up to eight images, and the three of the evaluation


def test_no_grids_if_not_wanted(make_trainer, tmp_path):
    make_trainer(logging_strategy="no").train()
    assert not (tmp_path / "run" / "images").exists()


def test_the_progress_bar_tells_how_it_goes(make_trainer, capsys, monkeypatch):
    # a wide terminal: some versions of transformers cut the bar to its width
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    make_trainer(disable_tqdm=False, eval_dataset=ROWS, eval_strategy="steps", eval_steps=2).train()
    captured = capsys.readouterr()
    assert re.search(r"reward=-?0\.\d+, ratio=1, clip_low=0, clip_high=0, images/s=\d", captured.err)
    assert "Evaluating" in captured.err
    lines = captured.out.splitlines() + captured.err.splitlines()
    assert any("'eval_reward'" in line for line in lines)
    assert not any("'grad_norm'" in line for line in lines)  # no line per update


def test_logs_hold_times_and_counts(make_trainer):
    trainer = make_trainer(max_steps=4, num_iterations=2, logging_steps=2, eval_dataset=ROWS)
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "loss" in log]
    phases = ["encode", "sample", "reward", "train", "rest"]
    for log in (first, second):
        times = [log[f"time/{phase}"] for phase in phases]
        assert min(times) >= 0 and sum(times) == pytest.approx(log["time/step"], rel=1e-3)
        # eight images in two updates
        assert log["images_per_second"] == pytest.approx(8 / (2 * log["time/step"]), rel=1e-3)
    assert (first["num_images"], second["num_images"]) == (8, 16)


def test_time_of_evaluating_and_saving_is_not_that_of_a_step(make_trainer):
    times = []

    def slow(prompts, images, **columns):
        times.append(time.perf_counter())
        time.sleep(1.0)
        times.append(time.perf_counter())
        return [0.0] * len(images)

    trainer = make_trainer(eval_dataset=ROWS, eval_reward_funcs=slow, eval_strategy="steps", eval_steps=1)
    trainer.train()
    second = [log for log in trainer.state.log_history if "loss" in log][1]
    _, end_of_first, start_of_second, _ = times
    assert second["time/step"] <= start_of_second - end_of_first and "time/evaluate" not in second


def test_another_rollout_size_in_the_middle_of_a_rollout_is_an_error(make_trainer):
    kwargs = dict(gradient_accumulation_steps=1, steps_per_generation=2, save_strategy="steps", save_steps=1)
    make_trainer(max_steps=1, **kwargs).train()
    trainer = make_trainer(max_steps=2, num_iterations=2, **kwargs)
    with pytest.raises(ValueError, match=r"middle of a rollout.*`num_iterations`.*\(4, 2, 1, 1\).*\(4, 2, 2, 1\)"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_level", 0.5),
        ("dynamics", "cps"),
        ("num_inference_steps", 4),
        ("guidance_scale", 2.0),
        ("height", 32),
        ("bf16", True),
        ("num_generations", 6),
        ("scale_rewards", "none"),
        ("advantage_scope", "group"),
        ("reward_weights", [2.0]),
        ("sde_window_size", 1),
        ("ratio_norm", True),
    ],
)
def test_what_a_rollout_is_scored_by_cannot_change_in_its_middle(make_trainer, name, value):
    kwargs = dict(gradient_accumulation_steps=1, steps_per_generation=2, save_strategy="steps", save_steps=1)
    make_trainer(max_steps=1, **kwargs).train()
    trainer = make_trainer(max_steps=2, **kwargs, **{name: value})
    value = re.escape(str(value))
    with pytest.raises(ValueError, match=rf"middle of a rollout that was drawn with `{name}` .*; now it is {value}"):
        trainer.train(resume_from_checkpoint=True)


def test_nor_can_the_type_of_the_frozen_weights(make_trainer):
    kwargs = dict(gradient_accumulation_steps=1, steps_per_generation=2, save_strategy="steps", save_steps=1)
    make_trainer(max_steps=1, **kwargs).train()
    trainer = make_trainer(max_steps=2, **kwargs)
    trainer.policy.vae.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"middle of a rollout that was drawn with `dtype` .*; now it is .*'bfloat16'"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_what_a_rollout_is_scored_by_can_change_at_its_end(make_trainer):
    kwargs = dict(gradient_accumulation_steps=1, steps_per_generation=2, save_strategy="steps", save_steps=1)
    make_trainer(max_steps=2, **kwargs).train()
    trainer = make_trainer(max_steps=3, noise_level=0.5, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    trainer = make_trainer(max_steps=4, noise_level=0.5, **kwargs)  # now in the middle, and as it was there
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
