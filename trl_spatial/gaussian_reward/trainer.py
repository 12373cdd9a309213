import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch.utils.data import RandomSampler
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput
from trl import RewardTrainer

from ..figures.pairs import ScoredPair, draw_pairs
from ..hub.cards import SAMPLES_FILE, Card
from ..preferences.images import load_image
from ..training.base import BaseTrainer
from ..training.hub import dataset_split
from .checkpoints import save_checkpoint
from .config import GaussianRewardConfig
from .data import (
    IS_REVERSE_COLUMN,
    ROW_COLUMN,
    DataCollatorForSpatialPreference,
    PreferencePairs,
    RowSampler,
    prepare_pairs,
)
from .kinds import SPATIAL_SCORE
from .losses import gaussian_bradley_terry_loss
from .model_card import build_card, training_settings
from .model_setup import copy_trained_parameters, resolve_model, resolved_settings, restore_fp32
from .modeling import GaussianRewardModel, keep_input_types
from .processing import SpatialScoreProcessor


logger = get_logger(__name__)

NUM_SAMPLES = 4  # pairs in the card's picture
# Metrics of every evaluation, apart from its speed
METRICS = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "mean_std", "num_tokens")


class GaussianRewardTrainer(BaseTrainer, RewardTrainer):
    """
    Trainer for reward models that assign a Gaussian score to an image and its prompt, as introduced in [Enhancing Spatial
    Understanding in Image Generation via Reward Modeling](https://huggingface.co/papers/2602.24233).

    This class is a [`~trl.RewardTrainer`] for pairs of images. It inherits all of its attributes and methods.

    See [`~training.base.BaseTrainer`] for checkpoints, resuming and signals, and [`~training.hub.HubTrainer`] for uploads
    (`push_to_hub`, `hub_strategy`).

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_spatial import GaussianRewardTrainer
    >>> from trl_spatial.gaussian_reward.modeling import spatial_score_lora_config

    >>> trainer = GaussianRewardTrainer(
    ...     model="Qwen/Qwen2.5-VL-7B-Instruct",
    ...     train_dataset=load_dataset("org/SpatialReward", split="train"),
    ...     peft_config=spatial_score_lora_config(),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`GaussianRewardModel`] or [`~peft.PeftModel`]):
            Model to be trained. Can be either:

            - A string, being the *model id* of an image-text model on huggingface.co, or a path to a *directory* with
              one. The reward model is built on it by [`GaussianRewardModel.from_backbone`] with the keyword arguments
              in `args.model_init_kwargs`. If `dtype` is not specified there, it defaults to the checkpoint's if
              `peft_config` is given, and otherwise to `float32`, as full training in bfloat16 would lose small updates. A
              whole reward model, merged or fully trained, is trained further.
            - A [`GaussianRewardModel`] object.
            - A [`~peft.PeftModel`] that wraps one, loaded with `is_trainable=True`.
        args ([`GaussianRewardConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to use to form a batch from a list of pairs. Will default to
            [`DataCollatorForSpatialPreference`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to use for training, with the columns of [`prepare_pairs`]: `prompt`, `chosen`, `rejected`, and
            optionally `margin` and `perturbed_prompt`. An [`~datasets.IterableDataset`] needs `max_steps` and restarts
            in the same order when it ends.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`. Several processes fill up the last
            batch of an [`~datasets.IterableDataset`], whose length is unknown, with pairs that then count twice.
        processing_class ([`SpatialScoreProcessor`], *optional*):
            Processor used to process the data. If `None`, it is loaded from the model's name with [`load_processor`],
            with `args.min_pixels` and `args.max_pixels`. It is saved with every checkpoint.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            The function that will be used to compute metrics at evaluation. Must take a
            [`~transformers.EvalPrediction`] and return a dictionary string to metric values. Its `predictions` are the
            tuple `(chosen_mean, chosen_log_std, rejected_mean, rejected_log_std)` of arrays of shape `(num_pairs,)`;
            its `label_ids` are an empty tuple.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        optimizer_cls_and_kwargs (`tuple[Type[torch.optim.Optimizer], Dict[str, Any]]`, *optional*):
            A tuple containing the optimizer class and keyword arguments to use. Overrides `optim` and `optim_args` in
            `args`.
        preprocess_logits_for_metrics (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*):
            A function that preprocesses the predictions right before caching them at each evaluation step.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the model from a model identifier. Combine with `peft_config`
            for QLoRA training.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model, such as [`spatial_score_lora_config`]. It must train the head
            and the reward token. If `None`, the model is not wrapped.
    """

    _tag_names = ["trl", "reward-trainer", "spatial-score"]
    _name = "Gaussian Reward"
    _kinds = (SPATIAL_SCORE,)
    # The meaning of the head's weights and which pairs come next depend on these, too.
    _fixed_arguments = (
        *BaseTrainer._fixed_arguments,
        "head_hidden_sizes", "log_std_min", "log_std_max", "use_reverse_pairs", "dataloader_num_workers",
    )  # fmt: skip
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the number of pairs of the whole update

    def __init__(
        self,
        model: str | GaussianRewardModel | PeftModel,
        args: GaussianRewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: SpatialScoreProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path  # "" for a model built in Python
            args = GaussianRewardConfig(f"{Path(name).name.partition('@')[0]}-GaussianReward".removeprefix("-"))
        elif not isinstance(args, GaussianRewardConfig):
            raise TypeError(f"`args` must be a `GaussianRewardConfig`, got `{type(args).__name__}`.")
        model, processing_class = resolve_model(
            model,
            args,
            processing_class,
            is_adapted=peft_config is not None,
            quantization_config=quantization_config,
        )
        trained = copy_trained_parameters(model)
        splits = {name: dataset_split(part) for name, part in _named(eval_dataset).items()}
        self._processor = processing_class
        self._samples: list[list[float]] = []  # scores of the first pairs of the last evaluation
        self._takes_samples = False

        super().__init__(
            model=model,
            args=_copy_for_parent(args),
            data_collator=data_collator
            or DataCollatorForSpatialPreference(processing_class, torch.bfloat16 if args.bf16 else torch.float32),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class.tokenizer,  # the parent reads its pad token
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
        )
        self.args.model_init_kwargs = args.model_init_kwargs
        self.processing_class = self.callback_handler.processing_class = processing_class
        self._evaluated = {
            name: (len(part.rows) if isinstance(part, PreferencePairs) else None, splits[name])
            for name, part in _named(self.eval_dataset).items()
        }
        if self._evaluated and compute_metrics is None:
            self._check_metric()
        restore_fp32(self.model, trained)
        keep_input_types(self.model)
        self._check_trainable()

    def _check_metric(self) -> None:
        """Checks before training, not after the first evaluation, that `metric_for_best_model` will be reported."""
        metric = self.args.metric_for_best_model
        prefixes = [name.removeprefix("eval").lstrip("_") for name in self._evaluated]
        metrics = [f"{prefix}_{name}".lstrip("_") for prefix in prefixes for name in METRICS]
        if metric is not None and metric.removeprefix("eval_") not in metrics:
            raise ValueError(
                f"`metric_for_best_model` is {metric!r}, but the evaluation will report {', '.join(metrics)}. Use one of them."
            )

    def _check_trainable(self) -> None:
        """Checks that the randomly initialized parts are trained."""
        if not all(any(p.requires_grad for p in module.parameters()) for module in self._new_modules()):
            raise ValueError(
                "The head or the reward token is frozen and would keep its random initialization. Use "
                "`peft_config=spatial_score_lora_config()`, or add `modules_to_save=['head', 'reward_token']` to your "
                "own; load a trained adapter with `is_trainable=True`."
            )

    def _new_modules(self) -> list[torch.nn.Module]:
        """The parts of the model that the backbone does not have: head and reward token."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        return [model.head, model.backbone.get_input_embeddings().reward_token]

    def _resolved_settings(self) -> dict[str, Any]:
        return resolved_settings(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.train_dataset,
            num_workers=self.args.dataloader_num_workers,
        )

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset | PreferencePairs,
        processing_class: PreTrainedTokenizerBase | SpatialScoreProcessor,
        args: GaussianRewardConfig,
        dataset_name: str,
    ) -> PreferencePairs | IterableDataset:
        if args.skip_bad_rows and args.should_save and dataset_name == "train":
            _bad_rows_file(args).parent.mkdir(parents=True, exist_ok=True)
            _bad_rows_file(args).write_text("")  # it lists only rows of this run
        return prepare_pairs(
            dataset,
            self._processor,
            dataset_name=dataset_name,
            max_length=args.max_length,
            use_reverse_pairs=args.use_reverse_pairs,
            skip_bad_rows=args.skip_bad_rows,
            bad_rows_file=_bad_rows_file(args) if args.should_save else None,
            num_threads=args.dataset_num_proc,
            show_progress=args.should_save and not args.disable_tqdm,
        )

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "chosen", "rejected", "margin", ROW_COLUMN, IS_REVERSE_COLUMN]

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # A stream that never ends: resuming skips the batches seen so far, but cannot skip past the end of a stream.
        return self._get_dataloader(
            dataset=self.train_dataset.repeat(None),
            description="Training",
            batch_size=self._train_batch_size,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        pairs = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(sampler, RandomSampler) and isinstance(pairs, PreferencePairs) and pairs.use_reverse_pairs:
            return RowSampler(len(pairs.rows), self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return sampler

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.head_learning_rate is not None:
            new = {id(param) for module in self._new_modules() for param in module.parameters()}
            for group in list(optimizer.param_groups):
                params = [param for param in group["params"] if id(param) in new]
                if params:
                    group["params"] = [param for param in group["params"] if id(param) not in new]
                    optimizer.add_param_group({**group, "params": params, "lr": self.args.head_learning_rate})
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Counts the pairs of an update, or of a batch in evaluation, over all processes."""
        num_pairs = sum(len(batch["input_ids"]) // 2 for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(num_pairs, device=device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        margin = inputs.pop("margin", None)

        # Score the chosen and the rejected images in one forward pass
        outputs = model(**inputs)
        chosen_mean, rejected_mean = torch.chunk(outputs.mean, chunks=2)  # each (num_pairs,)
        chosen_log_std, rejected_log_std = torch.chunk(outputs.log_std, chunks=2)  # each (num_pairs,)

        # Calculate loss. Evaluation needs no samples: it uses the exact value of what they estimate.
        losses = gaussian_bradley_terry_loss(
            chosen_mean,
            chosen_log_std,
            rejected_mean,
            rejected_log_std,
            objective=self.args.objective,
            estimator=self.args.estimator if mode == "train" else "closed_form",
            num_samples=self.args.num_samples,
            margin=margin,
        )  # (num_pairs,)
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * (chosen_mean + rejected_mean) ** 2
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # batches differ in size, but every pair counts the same; gradients are averaged over the processes
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch

        with torch.no_grad():
            mean_std = (chosen_log_std.exp() + rejected_log_std.exp()) / 2
            self._record_metrics(mode, losses, chosen_mean, rejected_mean, mean_std, inputs["attention_mask"])
            if mode == "eval" and self._takes_samples:
                # the first batch of the first process holds the first pairs
                scores = (chosen_mean, chosen_log_std.exp(), rejected_mean, rejected_log_std.exp())
                self._samples = torch.stack(scores, dim=1)[:NUM_SAMPLES].float().tolist()
                self._takes_samples = False
        if not return_outputs:
            return loss
        # One row per pair, so that the gathered predictions are the pairs of the dataset
        return loss, {
            "chosen_mean": chosen_mean,
            "chosen_log_std": chosen_log_std,
            "rejected_mean": rejected_mean,
            "rejected_log_std": rejected_log_std,
        }

    def _record_metrics(self, mode, losses, chosen_mean, rejected_mean, mean_std, attention_mask):
        if mode == "train":
            num_tokens_in_batch = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += num_tokens_in_batch // self._tp_size
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]

        # Only evaluation drops the rows that fill up the last batch: training trains on them.
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        table = gather(torch.stack([losses.float(), chosen_mean, rejected_mean, mean_std], dim=1))  # (num_pairs, 4)
        loss, chosen, rejected, std = table.unbind(1)
        metrics["min_reward"].append(torch.minimum(chosen, rejected).min().item())
        metrics["max_reward"].append(torch.maximum(chosen, rejected).max().item())
        # One entry per pair, so that the average over batches of different sizes is the average over pairs
        metrics["mean_reward"] += ((chosen + rejected) / 2).tolist()
        metrics["mean_std"] += std.tolist()
        metrics["accuracy"] += (chosen > rejected).float().tolist()
        metrics["margin"] += (chosen - rejected).tolist()
        if mode == "eval":  # replaces the parent's, which also counts the rows that fill up the last batch
            metrics["loss"] += loss.tolist()

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        self._metrics["eval"].clear()
        self._takes_samples = metric_key_prefix == next(iter(self._evaluated), None)
        if self._takes_samples:
            self._samples = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # Here and not in `log`, where the parent adds them: only here is the name of the evaluated dataset known.
        metrics = {key: sum(values) / len(values) for key, values in self._metrics["eval"].items()}
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in metrics.items()})
        self._metrics["eval"] = defaultdict(list)
        return output

    def predict(
        self,
        test_dataset: Dataset | IterableDataset | PreferencePairs,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def train(self, *args, **kwargs) -> TrainOutput:
        output = super().train(*args, **kwargs)
        if isinstance(self.train_dataset, IterableDataset) and _bad_rows_file(self.args).is_file():
            # A stream read several times, or skipped through on resuming, lists a row several times.
            num_bad_rows = len(set(_bad_rows_file(self.args).read_text(encoding="utf-8").splitlines()))
            logger.warning(f"Left out {num_bad_rows} rows of streams, listed in {_bad_rows_file(self.args)}.")
        return output

    # Saves everything that `SpatialScore.from_pretrained` needs in one folder, and no pickled training arguments
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_checkpoint(model, self.processing_class, output_dir, state_dict=state_dict)

    def _save_samples(self, folder: Path) -> None:
        """Draws the first pairs of the last evaluation with their scores."""
        if not self._samples:
            return
        dataset = self.eval_dataset
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        pairs = [
            ScoredPair(
                prompt=row["prompt"],
                chosen=load_image(row["chosen"]),
                rejected=load_image(row["rejected"]),
                chosen_score=(chosen_mean, chosen_std),
                rejected_score=(rejected_mean, rejected_std),
                caption="",
            )
            for row, (chosen_mean, chosen_std, rejected_mean, rejected_std) in zip(
                dataset, self._samples, strict=False
            )
        ]
        draw_pairs(pairs, title=f"Held-out pairs, step {self.state.global_step}").save(folder / SAMPLES_FILE)

    def _build_card(self) -> Card:
        return build_card(
            training_settings(self.args, self.model, self.processing_class, num_updates=self.state.global_step),
            self.state.log_history,
            evaluated=self._evaluated,
            eval_dataset=self.eval_dataset_name,
            base_model=self.model.config._name_or_path,
        )


def _copy_for_parent(args: GaussianRewardConfig) -> GaussianRewardConfig:
    """Copies the arguments, which the parent changes, without `model_init_kwargs`, about which it would warn."""
    own = copy.copy(args)
    own.accelerator_config = copy.copy(args.accelerator_config)
    own.accelerator_config.dispatch_batches = False  # or image patches would be distributed as if each were a row
    own.gradient_checkpointing_kwargs = copy.copy(args.gradient_checkpointing_kwargs)
    own.model_init_kwargs = None
    return own


def _named(eval_dataset: Any) -> dict[str, Any]:
    """Returns the evaluation datasets by the prefix of their metrics."""
    if isinstance(eval_dataset, dict):
        return {f"eval_{name}": part for name, part in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval": eval_dataset}


def _bad_rows_file(args: GaussianRewardConfig) -> Path:
    return Path(args.output_dir) / "_bad_rows.jsonl"  # the underscore keeps it from being pushed to the Hub
