"""
Trains tiny reward models: a script for `accelerate launch`.

    worker.py FOLDER BACKBONE JSON

The JSON is a list of runs, each the keyword arguments of `run`; each gets a folder of its own in FOLDER.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

from trl_spatial.gaussian_reward.config import GaussianRewardConfig
from trl_spatial.gaussian_reward.modeling import spatial_score_lora_config
from trl_spatial.gaussian_reward.processing import load_processor
from trl_spatial.gaussian_reward.trainer import GaussianRewardTrainer


WORDS = ["cube", "sphere", "cat", "lamp", "window", "table"]
TINY = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    per_device_eval_batch_size=2,
    dataloader_num_workers=0,
    learning_rate=1e-2,
    warmup_steps=0,
    max_steps=4,
    save_steps=2,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    estimator="closed_form",
    disable_dropout=True,
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    model_init_kwargs={"head_hidden_sizes": (16, 8)},
)


def make_pairs(num_rows):
    generator = np.random.default_rng(0)

    def picture(width):
        return Image.fromarray(generator.integers(0, 256, (32, width, 3), dtype=np.uint8))

    return Dataset.from_list(
        [
            {"prompt": f"a red {WORDS[row % 6]} in front of a lamp", "chosen": picture(32), "rejected": picture(48)}
            for row in range(num_rows)
        ]
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def run(folder, backbone, *, resume=None, stop_at=None, **settings):
    """Trains, and saves the model."""
    trainer = GaussianRewardTrainer(
        model=str(backbone),
        args=GaussianRewardConfig(str(folder), **(TINY | settings)),
        train_dataset=make_pairs(16),
        eval_dataset=make_pairs(7),  # not a multiple of what two processes take
        processing_class=load_processor(str(backbone), max_pixels=48 * 48),
        peft_config=spatial_score_lora_config(4, 8),
        callbacks=[StopAt(stop_at)] if stop_at else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[3]):
        run(Path(sys.argv[1]) / arguments.pop("folder"), sys.argv[2], **arguments)
