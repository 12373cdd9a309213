import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from accelerate.logging import get_logger
from accelerate.utils import TorchDynamoPlugin, save_fsdp_optimizer
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL.Image import Image
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PredictionOutput, SaveStrategy, TrainOutput, speed_metrics

from ...figures.grid import save_image_grid
from ...generation.drawing import draw_rows
from ...hub.cards import SAMPLES_FILE, Card
from ...training.base import BaseTrainer
from ...training.hub import dataset_split
from ...training.processes import fail_together
from ..advantages import combine_rewards
from ..kinds import LORA, TRANSFORMER
from ..policies import make_policy
from ..reward_functions import RewardFunctions, reward_intervals, reward_metrics
from . import checkpointing
from .adapters import without_adapters
from .base_config import DiffusionConfig
from .callbacks import RolloutProgressCallback, Samples, UpdateCallback, adapt_callbacks, log_samples
from .checks import check_data, check_evaluation
from .ema import EMA
from .evaluation import EvaluationOutput, PolicyGenerator, gather_evaluation, reward_images
from .metrics import TrainingMetrics
from .model_card import build_card
from .model_setup import (
    freeze_idle_modules,
    load_pipeline,
    loading_device,
    model_settings,
    prepare_transformer,
    sampling_options,
    shard_transformer,
)
from .monitoring import HackingMonitor, StepTimer
from .processes import check_launch
from .prompt_cache import PromptCache


logger = get_logger(__name__)

# Number of images in a grid
NUM_LOGGED_IMAGES = 8

Rows: TypeAlias = Dataset | list[dict[str, Any]]


class DiffusionTrainer(BaseTrainer):
    """
    A [`~transformers.Trainer`] for the transformer of a diffusion pipeline: everything but the algorithm.

    - Evaluation generates images with the averaged weights and rewards them.
    - Logs hold metrics of all processes, counts, and the time of each phase. Grids of images are saved.
    - The exported weights are uploaded to the Hub with their card (`push_to_hub`), see [`~training.hub.HubTrainer`].
    - Checkpoints hold exactly what training changes, see [`~training.base.BaseTrainer`]. The best one is always kept.

    A subclass provides the training data and the loss, `_method` and `_citation` for the card, and, if its state is more than its
    counts, `_training_state`, `_load_training_state` and `_merge_training_states`.

    Args:
        pipeline (`str` or [`~diffusers.DiffusionPipeline`]):
            Pipeline whose transformer is trained, or its name.
        args ([`~runtime.base_config.DiffusionConfig`]):
            Configuration for this trainer.
        train_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*):
            Dataset to use for training, with a column `"prompt"`.
        eval_dataset ([`~datasets.Dataset`], `list[dict]` or a `dict` of them, *optional*):
            Dataset to use for evaluation, with a column `"prompt"` and those that the reward functions need.
        eval_reward_functions ([`~reward_functions.RewardFunctions`], *optional*):
            Functions that judge the evaluation images, those that are trained on first. `eval_reward` is their weighted sum.
        num_trained_rewards (`int`, *optional*, defaults to `0`):
            Number of these functions that are trained on.
        callbacks, optimizers, peft_config:
            See [`DiffusionGRPOTrainer`].
    """

    _tag_names = ["spatial-rl", "trl"]
    _kinds = (LORA, TRANSFORMER)
    _method: ClassVar[str]  # a sentence on the model's card
    _citation: ClassVar[str]  # BibTeX of the method's paper, for the card
    _counted: ClassVar[tuple[str, ...]] = ("num_images", "num_policy_passes", "num_reference_passes")  # in every log

    def __init__(
        self,
        pipeline: str | DiffusionPipeline,
        args: DiffusionConfig,
        train_dataset: Rows | None,
        eval_dataset: Rows | dict[str, Rows] | None,
        eval_reward_functions: RewardFunctions | None = None,
        num_trained_rewards: int = 0,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start with `accelerate launch`, one process per GPU, or "
                "set `CUDA_VISIBLE_DEVICES`."
            )
        check_launch()
        if isinstance(pipeline, str):
            pipeline = load_pipeline(
                pipeline, torch.bfloat16 if args.bf16 else torch.float32, device=loading_device(args)
            )
        self.policy = make_policy(pipeline, max_sequence_length=args.max_sequence_length)
        self.eval_reward_functions, self._num_trained_rewards = eval_reward_functions, num_trained_rewards
        self._options, self._eval_options = sampling_options(self.policy, args)
        self.policy.check_size(self._options.height, self._options.width)
        self.policy.check_num_inference_steps(self._options.num_inference_steps)
        self.policy.check_guidance(self._eval_options)  # in training the same or none
        if train_dataset is not None:
            self._check_train_dataset(train_dataset)
        if eval_dataset is not None:
            check_evaluation(
                self.policy, eval_dataset, eval_reward_functions, self._eval_options, args.metric_for_best_model
            )
        set_seed(args.seed)  # for the initial weights of the adapters
        self._timer = StepTimer()

        super().__init__(
            model=prepare_transformer(self.policy, args, peft_config),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[UpdateCallback(self._timer.restart, self._on_update), *(callbacks or [])],
            optimizers=optimizers,
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RolloutProgressCallback)
        adapt_callbacks(self)

        if checkpointing.has_adapter(self.model) and self.model.dtype != torch.float32:
            # Adapters compute in the dtype of the frozen weights, see `adapt_to_inputs`, and need no `accelerator.autocast`.
            self.accelerator.native_amp = False
        self.policy.vae.to(args.device)
        if self.is_fsdp_enabled:
            shard_transformer(self.model, self.accelerator)
        # Training has the same guidance or none, so there is only one negative prompt
        negative_prompt = self.policy.negative_prompt(self._eval_options)
        self.prompt_cache = PromptCache(self.policy, args.device, negative_prompt=negative_prompt)
        self.ema = EMA(self.model, args.ema_decay, every=args.ema_steps) if args.ema_decay > 0 else None
        self._metrics = TrainingMetrics(self._counted)
        self._hacking_monitors: defaultdict[str, HackingMonitor] = defaultdict(HackingMonitor)

    def _check_train_dataset(self, dataset: Rows) -> None:
        check_data(dataset, "train_dataset", self.policy)

    def _resolved_settings(self) -> dict[str, Any]:
        return model_settings(self.policy.pipeline)

    # `torch_compile` is for the transformer's blocks, see `prepare_transformer`; the parent would compile all of it.
    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def num_examples(self, dataloader) -> int:
        return len(self.train_dataset)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._metrics = TrainingMetrics(self._counted)
        return super().train(*args, **kwargs)

    def _on_update(self) -> None:
        self._metrics.num_updates += 1
        if self.ema is not None:
            self.ema.step()

    @contextmanager
    def _reference_policy(self) -> Iterator[None]:
        """Context in which the transformer is the reference policy, without gradient: its adapters are switched off."""
        try:
            with torch.no_grad(), without_adapters(self.model):
                yield
        finally:
            freeze_idle_modules(self.policy)

    def _count_passes(self, kind: str, num_velocities: int) -> None:
        """Counts passes of one image through the transformer; classifier-free guidance takes two per velocity."""
        self._metrics.totals[f"num_{kind}_passes"] += num_velocities * self.policy.num_passes(self._options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a log of updates, not of an evaluation or the end of training
            logs = {**logs, **self._metrics.collect(self.accelerator, self._timer.collect())}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates the averaged weights, with the same noise every time, no noise in the steps, and both trained and held-out
        rewards. `ignore_keys` is not used. Returns metrics such as `eval_reward` and `eval_rewards/<name>/mean`, and the bounds of
        their 95 % intervals, for which whole prompts are resampled: `eval_reward_low`, `eval_rewards/<name>/high`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`eval_dataset` is `None`. Evaluation needs prompts: pass a dataset.")
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics

        start_time = time.time()
        with self._timer.phase("evaluate"):
            output = self._evaluate_policy(dataset)
            metrics = self._evaluation_metrics(output, metric_key_prefix)
            self._log_images(metric_key_prefix, self.state.global_step, output.images, output.prompts, output.rewards)
        metrics |= speed_metrics(metric_key_prefix, start_time, num_samples=len(output.rewards))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Rows, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Evaluates like [`~DiffusionTrainer.evaluate`], with the same arguments, and returns the rewards of every image.

        Returns:
            [`~transformers.trainer_utils.PredictionOutput`]: `predictions` of shape `(n, num_funcs)` are the rewards of
            `eval_reward_functions`, in the order of the rows; NaN where a function gave no reward.
        """
        with self._timer.phase("evaluate"):
            output = self._evaluate_policy(test_dataset)
            metrics = self._evaluation_metrics(output, metric_key_prefix)
        return PredictionOutput(output.rewards.numpy(), None, metrics)

    @property
    def _average(self) -> EMA | None:
        """The average of the weights; `None` before its first update, while it still equals the initial weights."""
        return self.ema if self.ema is not None and self.ema.num_updates >= self.args.ema_steps else None

    def _evaluate_policy(self, dataset: Rows) -> EvaluationOutput:
        """Draws and rewards the evaluation images on all processes."""
        args = self.args
        if self.eval_reward_functions is None:
            raise ValueError(
                "Evaluation scores images, but there is no reward function. Pass `eval_reward_funcs` (`--eval_rewards`)."
            )
        averaged = nullcontext() if self._average is None else self._average.applied()
        with fail_together("Evaluating", is_collective=self.is_fsdp_enabled), averaged:
            generator = PolicyGenerator(
                self.policy, self.model, self.prompt_cache, self._eval_options, self.accelerator.autocast
            )
            own_rows = range(args.process_index, len(dataset), args.world_size)
            self.prompt_cache.expect(dataset[index]["prompt"] for index in own_rows)
            batches = draw_rows(
                generator,
                dataset,
                batch_size=args.eval_sampling_batch_size,
                seed=args.seed,
                rank=args.process_index,
                world_size=args.world_size,
                is_collective=self.is_fsdp_enabled,
                progress="Evaluating" if self.is_world_process_zero() and not args.disable_tqdm else None,
            )
            output = reward_images(batches, self.eval_reward_functions, num_kept_images=NUM_LOGGED_IMAGES)
        return gather_evaluation(output)

    def _evaluation_metrics(self, output: EvaluationOutput, prefix: str) -> dict[str, float]:
        functions, num_trained = self.eval_reward_functions, self._num_trained_rewards
        assert functions is not None
        # Each image is its own group; held-out rewards have weight 0
        combined = combine_rewards(output.rewards, 1, functions.weights)
        metrics = reward_metrics(output.rewards, combined, functions.names)
        metrics |= reward_intervals(output.rewards, combined, functions.names, output.prompts)
        held_out = dict(zip(functions.names[num_trained:], output.rewards[:, num_trained:].unbind(1), strict=True))
        if num_trained == 0:  # there is no trained reward to exploit
            held_out = {}
        for warning in self._hacking_monitors[prefix].update(
            self.state.global_step, combined, held_out, output.prompts
        ):
            logger.warning(warning)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _log_images(
        self,
        name: str,
        number: int,
        images: list[Image],
        prompts: list[str],
        rewards: torch.Tensor,
        advantages: torch.Tensor | None = None,
    ) -> None:
        """Saves a grid of the first images and sends it to the trackers. All processes call it."""
        folder = Path(self.args.output_dir) / "images"
        with fail_together("Saving a grid of images"), self._saving(folder):
            if self.args.logging_strategy == "no" or not self.is_world_process_zero():
                return
            assert self.eval_reward_functions is not None
            shown = slice(NUM_LOGGED_IMAGES)
            images, prompts, rewards = images[shown], prompts[shown], rewards[shown]
            names = self.eval_reward_functions.names[: rewards.shape[1]]  # the trained ones come first
            captions = [_caption(names, row) for row in rewards.tolist()]
            grid = save_image_grid(folder / f"{name}_{number:06d}.png", images, prompts, captions)
            columns = dict(zip(names, rewards.T.tolist(), strict=True))
            if advantages is not None:
                columns["advantage"] = advantages[shown].tolist()
            samples = Samples(name, grid, prompts, images, columns)
            log_samples(self.callback_handler.callbacks, samples, self.state.global_step)

    def _training_state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """Returns this process's state: tensors, and anything that JSON can hold."""
        return {}, {"totals": self._metrics.totals}

    def _load_training_state(self, tensors: Mapping[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Restores the state from `_training_state`."""
        self._metrics.load_totals(extra["totals"])

    def _merge_training_states(self, states: list[tuple[dict[str, torch.Tensor], dict[str, Any]]]) -> dict[str, Any]:
        """
        Merges `states` saved by another number of processes into what this process continues from: the JSON part of a
        state, without tensors. Raises an error if their work cannot be redistributed.
        """
        # The counts of all processes are added up in the logs.
        totals: Counter[str] = Counter()
        for _, extra in states if self.args.process_index == 0 else states[:0]:
            totals.update(extra["totals"])
        return {"totals": totals}

    def _determine_best_metric(self, metrics, trial) -> bool:
        is_new_best = super()._determine_best_metric(metrics, trial)
        if is_new_best and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True
        return is_new_best

    def _save_checkpoint(self, model, trial) -> None:
        with self._timer.phase("save"):
            super()._save_checkpoint(model, trial)

    def _save_training_state(self, folder: Path) -> None:
        is_writer = self.args.should_save
        if is_writer or self.is_fsdp_enabled:
            checkpointing.save_trained_state(self.model, folder, ema=self.ema, is_writer=is_writer)
        checkpointing.save_buffer(*self._training_state(), folder, self.args.process_index)

    # For a sharded transformer, the parent would also gather and write the frozen weights.
    def _export(self, folder: Path) -> None:
        if self.is_fsdp_enabled:
            self._save(str(folder))
        else:
            super()._export(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    # Saves the averaged weights, as they were evaluated, and no pickle of the training arguments
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        is_writer = self.args.should_save
        folder = self.args.output_dir if output_dir is None else output_dir
        if is_writer or self.is_fsdp_enabled:
            checkpointing.export_weights(
                self.policy.pipeline, self.model, folder, ema=self._average, is_writer=is_writer
            )

    def _save_samples(self, folder: Path) -> None:
        """Copies the newest grid, the card's picture."""
        for name, last in self._last_grids().items():
            found = (Path(self.args.output_dir) / "images").glob(f"{name}*.png")
            grids = [path for path in found if _grid_number(path) <= last]
            if grids:
                shutil.copyfile(max(grids, key=_grid_number), folder / SAMPLES_FILE)
                return

    def _last_grids(self) -> dict[str, int]:
        """Names of the grids, preferred ones first, and the last number of each; later ones are from an interrupted attempt."""
        return {"eval": self.state.global_step}

    def _build_card(self) -> Card:
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        rewards = self.eval_reward_functions
        trained = [] if rewards is None else list(zip(rewards.names, rewards.weights.tolist(), strict=True))
        return build_card(
            self.args,
            self.state.log_history,
            method=self._method,
            citation=self._citation,
            settings=self._card_settings(),
            is_lora=checkpointing.has_adapter(self.model),
            pipeline_name=type(self.policy.pipeline).__name__,
            guidance=self.policy.pipeline_guidance(self._eval_options),
            trained_rewards=dict(trained[: self._num_trained_rewards]),
            eval_datasets={
                f"eval_{key}" if key else "eval": (len(part), self.eval_dataset_name, dataset_split(part))
                for key, part in evaluated.items()
                if part is not None
            },
            base_model=self.policy.pipeline.config.get("_name_or_path"),  # none if it was built in Python
        )

    def _card_settings(self) -> dict[str, Any]:
        """Training settings for the card, by their names there."""
        args = self.args
        lora = next(iter(self.model.peft_config.values())) if checkpointing.has_adapter(self.model) else None
        return {
            "adapters": None if lora is None else f"LoRA, rank {lora.r}, alpha {lora.lora_alpha}",
            "updates": self.state.global_step,
            "learning rate": args.learning_rate,
            "KL coefficient": args.beta,
            "moving average of the weights": None if self._average is None else args.ema_decay,
            "precision": "fp32" if args.mixed_precision == "no" else args.mixed_precision,
            "image size in training": f"{args.width} × {args.height}",
            "seed": args.seed,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        checkpointing.check_sharding(resume_from_checkpoint, is_sharded=self.is_fsdp_enabled)
        checkpointing.load_trained_state(self.model, resume_from_checkpoint, ema=self.ema)
        num_saved = checkpointing.num_buffers(resume_from_checkpoint)
        if num_saved in (0, self.args.world_size):  # with 0, loading raises an error
            self._load_training_state(*checkpointing.load_buffer(resume_from_checkpoint, self.args.process_index))
        else:
            states = [checkpointing.load_buffer(resume_from_checkpoint, rank) for rank in range(num_saved)]
            self._load_training_state({}, self._merge_training_states(states))

    def _load_best_model(self) -> None:
        checkpointing.load_trained_state(self.model, self.state.best_model_checkpoint, ema=self.ema)


def _grid_number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _caption(names: list[str], rewards: list[float]) -> str:
    values = ["none" if math.isnan(reward) else f"{reward:.3g}" for reward in rewards]
    return "\n".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
