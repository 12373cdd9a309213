from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, PeftType
from transformers import SchedulerType

from .config import GaussianRewardConfig
from .modeling import GaussianRewardModel
from .processing import SpatialScoreProcessor


def card_template(name: str) -> Path:
    """
    Returns the path of a card template of `hub_cards/`, which lies in the package when it is installed from a wheel and
    beside it in a checkout.

    Args:
        name (`str`):
            File name of the template.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"There is no card template {name} in {package / 'hub_cards'} or beside {package}.")


def build_model_card(
    template: str,
    *,
    model_name: str,
    model_id: str,
    trainer_name: str,
    paper: dict[str, str],
    settings: dict[str, Any],
    log_history: list[dict[str, Any]],
    base_model: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """
    Fills the card of a trained reward model with what was set and measured.

    Args:
        template (`str`):
            File name of the template in `hub_cards/`.
        model_name (`str`):
            Name of the model.
        model_id (`str`):
            What [`SpatialScore.from_pretrained`] loads it from.
        trainer_name (`str`):
            Name of the trainer.
        paper (`dict[str, str]`):
            `title`, `id` and `citation` of the paper of the method.
        settings (`dict[str, Any]`):
            What the training was set to; entries that are `None` are left out.
        log_history (`list[dict[str, Any]]`):
            Logs of the training. The last evaluation goes into the card.
        base_model (`str`, *optional*):
            Hub id of the backbone.
        dataset_name (`str`, *optional*):
            Hub id of the dataset.
        tags (`list[str]`, *optional*):
            Tags of the repository.
    """
    step, metrics = _last_evaluation(log_history)
    card_data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="trl_spatial",
        model_name=model_name,
        tags=["generated_from_trainer", *(tags or [])],
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(card_template(template)),
        base_model=base_model,
        dataset_name=dataset_name,
        metrics=metrics,
        metrics_step=step,
        model_id=model_id,
        model_name=model_name,
        paper=paper,
        settings={name: value for name, value in settings.items() if value is not None},
        trainer_name=trainer_name,
        versions={name: version(name) for name in ("trl", "transformers", "peft", "torch", "datasets", "tokenizers")},
    )


def training_settings(
    args: GaussianRewardConfig,
    model: GaussianRewardModel | PeftModel,
    processor: SpatialScoreProcessor,
    *,
    num_updates: int,
) -> dict[str, Any]:
    """Collects what a reader of the card wants to know about a training run, under the names of the card."""
    adapters = None
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        is_lora = isinstance(config, LoraConfig)
        adapters = f"LoRA, rank {config.r}, alpha {config.lora_alpha}" if is_lora else PeftType(config.peft_type).value
    size = processor.image_processor.size
    return {
        "objective": args.objective,
        "estimator": args.estimator,
        "adapters": adapters,
        "quantized backbone": "yes" if getattr(model, "is_quantized", False) else None,
        "pairs per update": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "updates": num_updates,
        "learning rate": args.learning_rate,
        "learning rate of head and reward token": args.head_learning_rate,
        "schedule": SchedulerType(args.lr_scheduler_type).value,
        "precision": args.mixed_precision,
        "pixels of an image": f"{size['shortest_edge']} to {size['longest_edge']}",
        "seed": args.seed,
    }


def _last_evaluation(log_history: list[dict[str, Any]]) -> tuple[int | None, dict[str, str]]:
    """Step and metrics of the last evaluation, of all its datasets if there were several."""
    is_about_speed = ("_runtime", "_per_second", "_time", "_num_tokens")
    steps = [log["step"] for log in log_history if any(key.startswith("eval_") for key in log)]
    metrics = {
        key.removeprefix("eval_"): f"{value:.4g}"
        for log in log_history
        if steps and log["step"] == steps[-1]
        for key, value in log.items()
        if key.startswith("eval_") and not key.endswith(is_about_speed)
    }
    return (steps[-1] if steps else None), metrics
