from dataclasses import dataclass
from typing import ClassVar

from ..runtime.base_config import DiffusionConfig, Ranges, option


@dataclass
class DiffusionDPOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionDPOTrainer`].

    This class includes only the parameters that are specific to preference training of a text-to-image model. For a full
    list of training arguments, please refer to [`~runtime.base_config.DiffusionConfig`] (images, evaluation) and the
    [`~transformers.TrainingArguments`] documentation.

    Parameters:
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is held to the reference, the transformer without its adapters. It multiplies
            errors that are means over the latent elements; [Diffusion-DPO](https://huggingface.co/papers/2311.12908) uses 2000
            and 5000.

    The noise levels at which pairs are seen are those of `eval_num_inference_steps` denoising steps at the size of training.

    > [!NOTE]
    > These parameters have default values different from [`~runtime.base_config.DiffusionConfig`]:
    > - `learning_rate`: Defaults to `1e-4` instead of `3e-4`: the images are not the policy's own, and large steps move it away
    >   from them.
    > - `gradient_accumulation_steps`: Defaults to `8` instead of `24`. A batch has `per_device_train_batch_size` pairs.
    > - `metric_for_best_model`: Defaults to `None` instead of `"reward"`, as evaluation is optional.
    """

    _ranges: ClassVar[Ranges] = {
        **DiffusionConfig._ranges,
        "beta": (1e-6, 1e6, "a positive number, such as 2000"),
    }

    # Parameters whose default values are overridden from DiffusionConfig
    learning_rate: float = option(1e-4, "The initial learning rate for AdamW.")
    per_device_train_batch_size: int = option(4, "Number of pairs per device and forward pass in training.")
    gradient_accumulation_steps: int = option(8, "Number of forward passes per update.")
    metric_for_best_model: str | None = option(
        None, "The evaluation metric that decides which checkpoint is best, such as `reward`."
    )
    beta: float = option(
        2000.0, "How strongly the policy is held to the reference, the transformer without its adapters."
    )
