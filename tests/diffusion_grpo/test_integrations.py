"""Through the real loggers, where they are installed: pictures are read back from what they wrote."""

import inspect
import json
import math

import numpy as np
import pytest
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from trl_spatial.diffusion_grpo.runtime.callbacks import Samples, adapt_callbacks, log_samples


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
SAMPLES = Samples(
    "eval", IMAGE, ["a cube", "a lamp"], [Image.new("RGB", (2, 2), color) for color in ("red", "blue")],
    {"redness": [1.0, math.nan]},
)  # fmt: skip


def make_plain_trainer(make_flux_pipeline, folder, report_to):
    args = TrainingArguments(output_dir=str(folder), report_to=report_to, use_cpu=True)
    return Trainer(model=make_flux_pipeline().transformer, args=args, train_dataset=[{}])


def test_nothing_is_logged_where_nobody_listens(make_flux_pipeline, tmp_path):
    trainer = make_plain_trainer(make_flux_pipeline, tmp_path, "none")
    callbacks = list(trainer.callback_handler.callbacks)
    adapt_callbacks(trainer)
    assert trainer.callback_handler.callbacks == callbacks
    log_samples(callbacks, SAMPLES, 3)


def test_tensorboard(make_flux_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_plain_trainer(make_flux_pipeline, tmp_path, "tensorboard")
    adapt_callbacks(trainer)
    handler = trainer.callback_handler
    assert sum(isinstance(callback, TensorBoardCallback) for callback in handler.callbacks) == 1
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)  # fails with transformers' own callback
    log_samples(handler.callbacks, SAMPLES, 3)
    handler.on_train_end(trainer.args, trainer.state, trainer.control)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    (event,) = events.Images("images/eval")
    assert (event.step, event.width, event.height) == (3, 12, 8)


def redness(prompts, images, **columns):
    """Mean of the red channel, and nothing for the last image."""
    return [*(float(np.asarray(image)[..., 0].mean()) for image in images[:-1]), None]


def test_trackio(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    from trl import GRPOTrainer

    make_trainer(
        redness, report_to="trackio", project="spatial", run_name="one", max_steps=1, eval_strategy="steps", eval_steps=1,
        eval_dataset=[{"prompt": "a cube"}, {"prompt": "a lamp"}],
    ).train()  # fmt: skip
    logs = SQLiteStorage.get_logs("spatial", "one")
    fields = {name: value for log in logs for name, value in log.items()}
    # Scalars and the table are called as TRL's trainer calls them
    source = inspect.getsource(GRPOTrainer)
    for name in ("reward", "reward_std", "frac_reward_zero_std", "kl"):
        assert f'"{name}"' in source and f"train/{name}" in fields
    for name in ("mean", "std"):
        assert f"rewards/{{reward_func_name}}/{name}" in source
        assert {f"train/rewards/redness/{name}", f"eval/rewards/redness/{name}"} <= set(fields)
    assert '"completions"' in source
    assert '"advantage"' in source
    for table, grid, num_rows, advantage in (
        ("completions", "images/rollout", 8, ["advantage"]),
        ("eval/completions", "images/eval", 2, []),
    ):
        rows = fields[table]["_value"]
        assert [list(row) for row in rows] == [["step", "prompt", "redness", *advantage, "image"]] * num_rows
        pictures = [Image.open(tmp_path / "trackio" / "media" / row["image"]["file_path"]) for row in rows]
        expected = redness([], [picture.convert("RGB") for picture in pictures])
        assert [row["redness"] for row in rows] == pytest.approx(expected)
        assert (tmp_path / "trackio" / "media" / fields[grid]["file_path"]).is_file()
    assert [row["prompt"] for row in fields["eval/completions"]["_value"]] == ["a cube", "a lamp"]
    rows = fields["completions"]["_value"]
    for group in (rows[:4], rows[4:]):  # of which the best and the worst image are trained on
        worst, best = sorted((row for row in group if row["advantage"] is not None), key=lambda row: row["advantage"])
        rewards = [row["redness"] for row in group if row["redness"] is not None]
        assert (worst["redness"], best["redness"]) == (min(rewards), max(rewards))
        assert worst["advantage"] < 0 < best["advantage"]


def test_wandb(make_flux_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_plain_trainer(make_flux_pipeline, tmp_path, "wandb")
    adapt_callbacks(trainer)
    handler = trainer.callback_handler
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    log_samples(handler.callbacks, SAMPLES, 3)
    handler.on_train_end(trainer.args, trainer.state, trainer.control)
    (path,) = tmp_path.rglob("*.png")
    assert Image.open(path).convert("RGB").tobytes() == IMAGE.tobytes()
    (path,) = tmp_path.rglob("*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "prompt", "redness", "image"]
    assert [row[:3] for row in table["data"]] == [[3, "a cube", 1.0], [3, "a lamp", None]]
