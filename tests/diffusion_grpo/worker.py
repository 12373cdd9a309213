"""
Trains tiny pipelines and writes down what was seen: a script for `accelerate launch`.

    worker.py FOLDER JSON

The JSON is a list of runs, each the keyword arguments of `run`; each gets a folder of its own in FOLDER.
"""

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from flux import build_flux_pipeline
from peft import LoraConfig
from qwen_image import build_qwen_image_pipeline
from transformers import TrainerCallback

from trl_spatial import DiffusionGRPOTrainer, DiffusionNFTTrainer


PROMPTS = ["a red cube", "a blue sphere", "a lamp", "a table", "a dog"]  # not a multiple of what a rollout takes
FAMILIES = {"flux": build_flux_pipeline, "qwen_image": build_qwen_image_pipeline}
LORA = dict(r=2, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_v", "add_k_proj"])
# Two prompts per process and rollout. The learning rate falls, so that the schedule has a state too.
TINY = dict(
    num_generations=4,
    top_k=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    rollout_batch_size=2,
    num_inference_steps=3,
    eval_num_inference_steps=2,
    height=16,
    width=16,
    max_sequence_length=16,
    learning_rate=1e-2,
    lr_scheduler_type="linear",
    ema_steps=2,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
# Of each algorithm: its trainer, and its own settings
ALGORITHMS = {
    "grpo": (DiffusionGRPOTrainer, dict(sde_window_size=1, sde_window_range=[0, 2])),
    "nft": (DiffusionNFTTrainer, dict(beta=0.01, num_noise_levels=2, old_policy_warmup=4)),
}


class Redness:
    """A reward that writes down prompts and digests of images, and fails, or takes long, on one process if it is told to."""

    __name__ = "redness"

    def __init__(self, fail=None):
        self.fail = fail
        self.seen = []
        self.num_calls = 0

    def __call__(self, prompts, images, **columns):
        self.num_calls += 1
        if self.fail and (self.num_calls, int(os.environ["RANK"])) == (self.fail["call"], self.fail["rank"]):
            time.sleep(self.fail["seconds"])
            if self.fail.get("exits"):
                sys.exit()
            raise ConnectionError("the judge does not answer")
        pixels = [np.asarray(image) for image in images]
        digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        self.seen += [list(pair) for pair in zip(prompts, digests, strict=True)]
        return [float(image[..., 0].mean() - image[..., 1:].mean()) for image in pixels]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


class FullDisk(TrainerCallback):
    """Lets one process write to no file after an update or an evaluation, as if its disk were full, until `empty` is called."""

    def __init__(self, rank, after):
        self.after = after if int(os.environ.get("RANK", 0)) == rank else None
        self.outputs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.fill("update")

    def on_evaluate(self, args, state, control, **kwargs):
        self.fill("evaluation")

    def fill(self, event):
        if event == self.after and not self.outputs:
            self.outputs = [os.dup(number) for number in (1, 2)]  # they may be files, too
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def empty(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for number, output in enumerate(self.outputs, start=1):
            os.dup2(output, number)


def shard_on_cpus():
    """Makes accelerate shard (FSDP2) on CPUs too, where it falls back on whole copies of the model by itself."""
    state = Accelerator(cpu=True, mixed_precision="no").state
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = "true", "2"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def run(
    folder,
    *,
    algorithm="grpo",
    family="flux",
    resume=None,
    stop_at=None,
    fail=None,
    full_disk=None,
    num_eval_rows=3,
    is_full=False,
    is_sharded=False,
    **settings,
):
    """Trains, and leaves `record_<rank>.json` beside the checkpoints: what the reward saw, the logs and the error."""
    reward, disk = Redness(fail), FullDisk(**(full_disk or {"rank": None, "after": None}))
    trainer_class, own = ALGORITHMS[algorithm]
    config = trainer_class._config_class(str(folder), **(TINY | own | settings))
    if is_sharded:
        shard_on_cpus()
    error, trainer = None, None
    try:
        trainer = trainer_class(
            FAMILIES[family](),
            reward,
            config,
            train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
            eval_dataset=[{"prompt": prompt} for prompt in PROMPTS[:num_eval_rows]],
            peft_config=None if is_full else LoraConfig(**LORA),
            callbacks=[disk, StopAt(stop_at)],
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.push_to_hub() if trainer.args.push_to_hub else trainer.save_model()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    disk.empty()
    record = {"error": error, "seen": reward.seen, "log": [] if trainer is None else trainer.state.log_history}
    name = f"record_{config.process_index}.json"
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / name).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, arguments in enumerate(json.loads(sys.argv[2])):
        run(Path(sys.argv[1]) / arguments.pop("folder", str(number)), **arguments)
