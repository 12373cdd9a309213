"""Through the real loggers, where they are installed: pictures are read back from what they wrote."""

import numpy as np
import pytest
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from trl_spatial.diffusion_grpo.runtime.callbacks import adapt_callbacks, log_image


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))


def make_trainer(make_flux_pipeline, folder, report_to):
    args = TrainingArguments(output_dir=str(folder), report_to=report_to, use_cpu=True)
    return Trainer(model=make_flux_pipeline().transformer, args=args, train_dataset=[{}])


def test_nothing_is_logged_where_nobody_listens(make_flux_pipeline, tmp_path):
    trainer = make_trainer(make_flux_pipeline, tmp_path, "none")
    callbacks = list(trainer.callback_handler.callbacks)
    adapt_callbacks(trainer)
    assert trainer.callback_handler.callbacks == callbacks
    log_image(callbacks, IMAGE, "eval/images", 3)


def test_tensorboard(make_flux_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_trainer(make_flux_pipeline, tmp_path, "tensorboard")
    adapt_callbacks(trainer)
    handler = trainer.callback_handler
    assert sum(isinstance(callback, TensorBoardCallback) for callback in handler.callbacks) == 1
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)  # fails with transformers' own callback
    log_image(handler.callbacks, IMAGE, "eval/images", 3)
    handler.on_train_end(trainer.args, trainer.state, trainer.control)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    (event,) = events.Images("eval/images")
    assert (event.step, event.width, event.height) == (3, 12, 8)


def test_trackio(make_flux_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    trainer = make_trainer(make_flux_pipeline, tmp_path, "trackio")
    adapt_callbacks(trainer)
    handler = trainer.callback_handler
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    log_image(handler.callbacks, IMAGE, "eval/images", 3)
    handler.on_train_end(trainer.args, trainer.state, trainer.control)
    (path,) = (tmp_path / "trackio").rglob("*.png")
    assert Image.open(path).convert("RGB").tobytes() == IMAGE.tobytes()


def test_wandb(make_flux_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(make_flux_pipeline, tmp_path, "wandb")
    adapt_callbacks(trainer)
    handler = trainer.callback_handler
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    log_image(handler.callbacks, IMAGE, "eval/images", 3)
    handler.on_train_end(trainer.args, trainer.state, trainer.control)
    (path,) = tmp_path.rglob("*.png")
    assert Image.open(path).convert("RGB").tobytes() == IMAGE.tobytes()
