"""Training that was interrupted goes on as if it had not been: bit for bit, and whatever a kill leaves on disk."""

import json
import shutil
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.warm import run_python
from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_spatial.generation.seeds import image_generator
from trl_spatial.store import is_complete, mark_complete
from trl_spatial.training import base
from trl_spatial.training.run_folder import last_complete_checkpoint


PROMPTS = ["a red cube", "a blue sphere", "a lamp", "a table", "a dog"]  # not a multiple of what a rollout takes
LORA = dict(r=2, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_v"])
# The learning rate falls, so that the schedule has a state too; adapters move visibly in a few updates.
TINY = dict(
    num_generations=4,
    top_k=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_inference_steps=3,
    eval_num_inference_steps=2,
    height=16,
    width=16,
    max_sequence_length=16,
    learning_rate=1e-2,
    lr_scheduler_type="linear",
    ema_steps=2,
    gradient_checkpointing=False,
    max_steps=4,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)


def redness(prompts, images, **columns):
    pixels = [np.asarray(image, dtype=np.float64) for image in images]
    return [float(image[..., 0].mean() - image[..., 1:].mean()) for image in pixels]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def build_trainer(pipeline, folder, *, callbacks=None, is_full=False, eval_reward_funcs=None, **kwargs):
    return DiffusionGRPOTrainer(
        pipeline=pipeline,
        reward_funcs=redness,
        args=DiffusionGRPOConfig(output_dir=str(folder), **{**TINY, **kwargs}),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        eval_dataset=[{"prompt": prompt} for prompt in PROMPTS[:2]],
        eval_reward_funcs=eval_reward_funcs,
        peft_config=None if is_full else LoraConfig(**LORA),
        callbacks=callbacks,
    )


@pytest.fixture
def make_trainer(make_flux_pipeline, tmp_path):
    """A function that builds a trainer in a folder of the test's, with a new pipeline of the same weights."""
    return lambda folder, **kwargs: build_trainer(make_flux_pipeline(), tmp_path / folder, **kwargs)


@pytest.fixture(scope="module")
def whole_run(make_flux_pipeline, tmp_path_factory):
    """Folder of a run of four updates that nothing interrupted, with a checkpoint after each. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("whole")
    build_trainer(make_flux_pipeline(), folder, save_steps=1).train()
    return folder


def assert_equal(ours, theirs, name):
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), name
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{name}, {key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), name
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{name}, {index}")
    elif isinstance(ours, (torch.Tensor, np.ndarray)):
        assert bytes(np.asarray(ours)) == bytes(np.asarray(theirs)), name
    else:
        assert ours == theirs, name


def read_safetensors(path):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).view(torch.uint8) for name in sorted(file.keys())}
        return {**tensors, "metadata": dict(sorted(file.metadata().items()))}


def logs_of(folder):
    """What was logged, without what the clock says."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clocks = ("time/", "images_per_second", "train_", "eval_runtime", "eval_s")
    return [{key: value for key, value in logs.items() if not key.startswith(clocks)} for logs in history]


def assert_same_checkpoint(ours, theirs):
    """Weights, average, optimizer, schedule, random states, buffer and logs are equal to the last bit."""
    files = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    assert files == {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    compared = 0
    for file in files:
        if file.suffix in (".pt", ".pth", ".bin"):
            states = [torch.load(folder / file, weights_only=False) for folder in (ours, theirs)]
            assert_equal(*states, str(file))
        elif file.suffix == ".safetensors":
            assert_equal(*map(read_safetensors, (ours / file, theirs / file)), str(file))
        else:
            continue
        compared += 1
    names = {"scheduler.pt", "trained_weights.safetensors", "ema.safetensors", "buffer_0.safetensors"}
    assert names <= set(map(str, files)) and compared >= 6
    assert {"optimizer.pt", "optimizer.bin"} & set(map(str, files))  # of whole weights, or of shared-out ones
    assert logs_of(ours) == logs_of(theirs)


CASES = {
    "one update per rollout": {},
    "in the middle of a rollout": dict(gradient_accumulation_steps=1, steps_per_generation=3),
    "in the middle of a rollout whose activations are reused": dict(
        gradient_accumulation_steps=1,
        steps_per_generation=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"reuse_activations": True},
    ),
    "in the middle of a second iteration": dict(
        gradient_accumulation_steps=1, steps_per_generation=2, num_iterations=2, ratio_norm=True, max_steps=6
    ),
    "full fine-tuning": dict(is_full=True, beta=0.0, learning_rate=1e-4, top_k=None, num_generations=2),
    "bf16, recomputed, a window": dict(
        bf16=True, gradient_checkpointing=True, sde_window_size=1, sde_window_range=[0, 2], dynamics="cps"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_training_goes_on_bit_for_bit(make_trainer, tmp_path, case):
    kwargs = CASES[case]
    end = kwargs.get("max_steps", TINY["max_steps"])
    make_trainer("whole", save_steps=end, **kwargs).train()
    make_trainer("parts", save_steps=end // 2, callbacks=[StopAt(end // 2)], **kwargs).train()
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == [f"checkpoint-{end // 2}"]
    make_trainer("parts", save_steps=end // 2, **kwargs).train(resume_from_checkpoint=True)
    assert_same_checkpoint(tmp_path / "parts" / f"checkpoint-{end}", tmp_path / "whole" / f"checkpoint-{end}")
    middle, last = (
        load_file(tmp_path / "parts" / f"checkpoint-{step}" / "trained_weights.safetensors")
        for step in (end // 2, end)
    )
    assert any(not torch.equal(middle[name], last[name]) for name in last)  # it was trained


def test_evaluating_and_saving_do_not_change_training(make_trainer, tmp_path, whole_run):
    make_trainer("plain", save_steps=4, eval_strategy="no").train()
    make_trainer("busy", save_steps=4, eval_strategy="steps", eval_steps=1).train()
    for name in ("trained_weights.safetensors", "ema.safetensors"):
        plain, *others = (
            folder / "checkpoint-4" / name for folder in (tmp_path / "plain", tmp_path / "busy", whole_run)
        )
        assert all(other.read_bytes() == plain.read_bytes() for other in others)


class TestHalfWritten:
    @pytest.fixture
    def run(self, whole_run, tmp_path):
        """A copy of the run, to be damaged."""
        return Path(shutil.copytree(whole_run, tmp_path / "run"))

    def test_is_recognised_whichever_file_is_missing_or_cut(self, run):
        last, before = run / "checkpoint-4", str(run / "checkpoint-3")
        assert last_complete_checkpoint(run) == str(last)
        files = [path for path in last.rglob("*") if path.is_file()]
        assert len(files) >= 9
        for path in files:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            assert last_complete_checkpoint(run) == before, path
            path.unlink()
            assert last_complete_checkpoint(run) == before, path
            path.write_bytes(content)
        assert last_complete_checkpoint(run) == str(last)

    def test_is_not_resumed_from_and_written_anew(self, run, make_trainer, whole_run):
        for name in ("optimizer.pt", "checkpoint.json"):
            (run / "checkpoint-4" / name).unlink()
        (run / "checkpoint-3" / "trained_weights.safetensors").write_bytes(b"")
        (run / "checkpoint-4" / "left_over.bin").write_bytes(b"of the run that was killed")
        make_trainer("run", save_steps=1).train(resume_from_checkpoint=True)
        for step in (3, 4):
            assert is_complete(run / f"checkpoint-{step}")
            assert_same_checkpoint(run / f"checkpoint-{step}", whole_run / f"checkpoint-{step}")

    def test_is_an_error_if_asked_for(self, run, make_trainer):
        (run / "checkpoint-4" / "checkpoint.json").unlink()
        with pytest.raises(ValueError, match=r"checkpoint-4', which is incomplete.*resume_from_checkpoint=True"):
            make_trainer("run").train(resume_from_checkpoint=str(run / "checkpoint-4"))

    def test_older_checkpoints_stay_until_the_new_one_is_whole(self, make_trainer, tmp_path, monkeypatch):
        seen = []

        def look_and_mark(folder):  # the last step of a save
            seen.append([path.name for path in (tmp_path / "run").glob("checkpoint-*") if is_complete(path)])
            mark_complete(folder)

        monkeypatch.setattr(base, "mark_complete", look_and_mark)
        make_trainer("run", save_steps=1, save_total_limit=1, max_steps=2).train()
        assert seen == [[], ["checkpoint-1"]]
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


# Kills itself in the middle of the save after the third update: weights and optimizer are written, the rest is not.
KILLED = """
    import os, signal, sys

    sys.path[:0] = {path!r}
    from flux import build_flux_pipeline
    from test_resume import build_trainer
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState


    class Kill(TrainerCallback, ExportableState):
        step = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.step = state.global_step

        def state(self):
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return {{"args": {{}}, "attributes": {{}}}}


    build_trainer(build_flux_pipeline(), {folder!r}, save_steps=1, callbacks=[Kill()]).train()
"""


def test_a_process_killed_while_saving_is_resumed(make_trainer, tmp_path, whole_run):
    tests, repository = Path(__file__).parent, Path(__file__).parents[2]
    paths = [str(tests), str(repository), str(repository / "recipes" / "tiny")]
    script = textwrap.dedent(KILLED).format(path=paths, folder=str(tmp_path / "killed"))
    process = run_python(["-c", script])
    assert process.returncode == -signal.SIGKILL, process.stderr
    half_written = tmp_path / "killed" / "checkpoint-3"
    assert (half_written / "optimizer.pt").is_file() and not is_complete(half_written)

    make_trainer("killed", save_steps=1).train(resume_from_checkpoint=True)
    for step in (3, 4):
        assert_same_checkpoint(tmp_path / "killed" / f"checkpoint-{step}", whole_run / f"checkpoint-{step}")


class TestExport:
    def evaluate(self, make_trainer, **kwargs):
        """Trains, and evaluates the last weights; the trainer's folder, and the images it judged."""
        judged = []

        def look(prompts, images, **columns):
            judged.extend(images)
            return [0.0] * len(images)

        trainer = make_trainer(
            "run", eval_reward_funcs=look, save_steps=2, max_steps=2, per_device_eval_batch_size=1, **kwargs
        )
        trainer.train()
        trainer.evaluate()
        return trainer, judged

    def draw(self, pipeline, args):
        pipeline.set_progress_bar_config(disable=True)
        return [
            pipeline(
                prompt,
                height=args.eval_height or args.height,
                width=args.eval_width or args.width,
                num_inference_steps=args.eval_num_inference_steps,
                guidance_scale=args.guidance_scale,
                max_sequence_length=args.max_sequence_length,
                generator=image_generator(args.seed, row, 0),
            ).images[0]
            for row, prompt in enumerate(PROMPTS[:2])
        ]

    def assert_same(self, ours, theirs):
        for one, other in zip(ours, theirs, strict=True):
            # grey levels: loaded weights lie at other addresses, where kernels round differently
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1

    @pytest.mark.parametrize("ema_decay", [0.9, 0.0])
    def test_adapters_loaded_by_diffusers_draw_the_evaluation_images(
        self, make_trainer, flux_folder, tmp_path, ema_decay
    ):
        trainer, images = self.evaluate(make_trainer, ema_decay=ema_decay)
        pipeline = FluxPipeline.from_pretrained(flux_folder)
        untrained = self.draw(pipeline, trainer.args)
        assert np.abs(np.asarray(untrained[0]).astype(int) - np.asarray(images[0])).max() > 1
        pipeline.load_lora_weights(tmp_path / "run" / "checkpoint-2")
        self.assert_same(self.draw(pipeline, trainer.args), images)
        # the model that is saved by hand is the same
        trainer.save_model(tmp_path / "saved")
        saved, exported = (
            read_safetensors(folder / "pytorch_lora_weights.safetensors")
            for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-2")
        )
        assert_equal(saved, exported, "adapters")

    def test_a_fully_trained_transformer_draws_the_evaluation_images(self, make_trainer, flux_folder, tmp_path):
        trainer, images = self.evaluate(make_trainer, is_full=True, beta=0.0, learning_rate=1e-4)
        folder = tmp_path / "run" / "checkpoint-2"
        transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        self.assert_same(
            self.draw(FluxPipeline.from_pretrained(flux_folder, transformer=transformer), trainer.args), images
        )

    def test_a_checkpoint_of_adapters_holds_no_frozen_weight(self, make_trainer, tmp_path):
        trainer = make_trainer("run", save_steps=2, max_steps=2)
        trainer.train()
        numels = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
        optimizer = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt")
        assert len(optimizer["state"]) == len(numels)
        for name in ("trained_weights", "ema", "pytorch_lora_weights"):
            tensors = load_file(tmp_path / "run" / "checkpoint-2" / f"{name}.safetensors")
            assert sorted(tensor.numel() for tensor in tensors.values()) == sorted(numels)
