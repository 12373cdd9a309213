"""The reward model: an image-text backbone without its LM head, one trainable token, and a Gaussian head.

The model reads the last-layer hidden state at the reward token and turns it into the mean and the log standard
deviation of a one-dimensional Gaussian score, as in SpatialScore
([papers/2602.24233](https://huggingface.co/papers/2602.24233)).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, cached_file

from ..hub.references import find_reference
from ..hub.safety import check_repository
from .patches import multiply_patches
from .quantization import copy_loading_state, quantize_language_model_only
from .shared_prefixes import encode_rows, use_shared_prefixes
from .vision_attention import use_packed_sdpa
from .weights import DAMAGED, check_finite, check_no_missing_keys, check_types


class GaussianRewardModelConfig(PreTrainedConfig):
    """
    Configuration of a [`GaussianRewardModel`].

    Args:
        backbone_config ([`~transformers.PreTrainedConfig`] or `dict`, *optional*):
            Configuration of the image-text backbone. Only a default instance has none.
        reward_token_id (`int`, *optional*):
            Token at which the score is read. It may lie beyond the backbone's embedding matrix.
        head_hidden_sizes (`tuple[int, ...]`, *optional*, defaults to `(1024, 16)`):
            Hidden sizes of the head's multilayer perceptron.
        head_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout after each hidden layer of the head.
        log_std_min (`float`, *optional*, defaults to `-4.0`):
            Lower bound of the log standard deviation.
        log_std_max (`float`, *optional*, defaults to `3.0`):
            Upper bound of the log standard deviation.
        backbone_revision (`str`, *optional*):
            Revision of the backbone on the Hub, so that an adapter finds the weights it was trained on.
    """

    model_type = "gaussian_reward"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    reward_token_id: int | None = None
    head_hidden_sizes: tuple[int, ...] = (1024, 16)
    head_dropout: float = 0.05
    log_std_min: float = -4.0
    log_std_max: float = 3.0
    backbone_revision: str | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        self.head_hidden_sizes = tuple(self.head_hidden_sizes)
        if not self.log_std_min < self.log_std_max:
            raise ValueError(
                f"`log_std_min` must be below `log_std_max`, got {self.log_std_min} and {self.log_std_max}."
            )
        if not 0.0 <= self.head_dropout < 1.0:
            raise ValueError(f"`head_dropout` must lie in [0, 1), got {self.head_dropout}.")
        kwargs["num_labels"] = 1  # one reward, although the head has two outputs
        super().__post_init__(**kwargs)


@dataclass
class GaussianRewardOutput(ModelOutput):
    """
    Output of a [`GaussianRewardModel`].

    Args:
        mean (`torch.FloatTensor` of shape `(batch_size,)`):
            Mean of the score, fp32. Higher is better; the scale is the logit of Bradley-Terry.
        log_std (`torch.FloatTensor` of shape `(batch_size,)`):
            Natural logarithm of the score's standard deviation, fp32.
    """

    mean: torch.FloatTensor | None = None
    log_std: torch.FloatTensor | None = None


class GaussianHead(nn.Module):
    """
    Multilayer perceptron from a hidden state to the mean and log standard deviation of a score, with dropout after each hidden
    layer. It computes in fp32, whatever the backbone's type and whether or not autocast is on: differences between rewards are small.
    """

    def __init__(
        self, input_size: int, hidden_sizes: tuple[int, ...], dropout: float, log_std_min: float, log_std_max: float
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for in_size, out_size in zip((input_size, *hidden_sizes), hidden_sizes, strict=False):
            layers += [nn.Linear(in_size, out_size, dtype=torch.float32), nn.ReLU(), nn.Dropout(dropout)]
        layers.append(nn.Linear(hidden_sizes[-1] if hidden_sizes else input_size, 2, dtype=torch.float32))
        self.layers = nn.Sequential(*layers)
        self.log_std_center = (log_std_min + log_std_max) / 2
        self.log_std_half_range = (log_std_max - log_std_min) / 2

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps hidden states of shape `(batch_size, input_size)` to mean and log std, each `(batch_size,)` in fp32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            values = hidden_states.float()
            for layer in self.layers:
                if isinstance(layer, nn.Linear):  # FSDP2 and DeepSpeed hand out the weights in bf16
                    values = F.linear(values, layer.weight.float(), layer.bias.float())
                else:
                    values = layer(values)
            mean, raw_log_std = values.unbind(-1)  # each (batch_size,)
            # Nearly the identity around the center, and smooth up to the bounds: a clamp would have no gradient there.
            offset = (raw_log_std - self.log_std_center) / self.log_std_half_range
            log_std = self.log_std_center + self.log_std_half_range * torch.tanh(offset)
        return mean, log_std


class RewardTokenEmbedding(nn.Module):
    """
    A frozen embedding matrix plus one trainable row for the reward token.

    The row is stored separately from the matrix, so training cannot change any other row, an adapter stores one row instead of
    the matrix, and the matrix never needs resizing, whatever the token's id.
    """

    def __init__(self, base: nn.Embedding, reward_token_id: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.reward_token_id = reward_token_id
        # fp32: steps of 1e-6 would be lost in bf16.
        self.reward_token = nn.Embedding(1, base.embedding_dim, device=base.weight.device, dtype=torch.float32)

    @torch.no_grad()
    def reset_reward_token(self) -> None:
        """Sets the trainable row to the mean of the matrix: a vector of typical size that stands for no word."""
        if self.base.weight.dim() != 2:
            raise ValueError(
                "The embedding matrix is sharded (DeepSpeed ZeRO stage 3), so its mean cannot be taken. Use ZeRO stage "
                "2 or FSDP."
            )
        self.reward_token.weight.copy_(self.base.weight.mean(0, keepdim=True, dtype=torch.float32))

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Embeds ids of shape `(..., sequence_length)` to `(..., sequence_length, hidden_size)`."""
        is_reward_token = input_ids == self.reward_token_id
        embeddings = self.base(input_ids.masked_fill(is_reward_token, 0))
        row = self.reward_token(input_ids.new_zeros(1)).to(embeddings.dtype)  # (1, hidden_size)
        return torch.where(is_reward_token.unsqueeze(-1), row, embeddings)


class GaussianRewardModel(PreTrainedModel):
    """
    Image-text reward model whose score is a Gaussian.

    Build it with [`~GaussianRewardModel.from_backbone`]; `from_pretrained` loads a model saved whole.

    Args:
        config ([`GaussianRewardModelConfig`]):
            Configuration.
        backbone ([`~transformers.PreTrainedModel`], *optional*):
            The image-text model without its LM head. If `None`, it is built from the configuration with random weights.
    """

    config_class = GaussianRewardModelConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GaussianRewardModelConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if not isinstance(config.backbone_config, PreTrainedConfig) or config.reward_token_id is None:
            raise ValueError("The configuration needs `backbone_config` and `reward_token_id`. Use `from_backbone`.")
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.head = GaussianHead(
            config.backbone_config.get_text_config().hidden_size,
            config.head_hidden_sizes,
            config.head_dropout,
            config.log_std_min,
            config.log_std_max,
        )
        embedding = RewardTokenEmbedding(self.backbone.get_input_embeddings(), config.reward_token_id)
        self.backbone.set_input_embeddings(embedding)
        multiply_patches(self.backbone)
        use_packed_sdpa(self.backbone)
        use_shared_prefixes(self.backbone)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the backbone initializes itself, the head keeps PyTorch's default, the reward token gets the mean row."""

    def _autocast(self) -> AbstractContextManager:
        """Context in which fp32 adapters compute in the dtype of a half-precision backbone, in scoring as in training."""
        if self.backbone.dtype == torch.float32:
            return nullcontext()  # leaves the trainer's in effect, if there is one
        return torch.autocast(self.device.type, dtype=self.backbone.dtype)

    def enable_input_require_grads(self) -> None:
        """
        Lets gradients into checkpointed layers whose inputs come from frozen weights, but only in parts that are trained: in
        a frozen vision tower, they would cost a second forward pass and a backward pass, for nothing.
        """
        self.disable_input_require_grads()
        owners: dict[nn.Module, PreTrainedModel] = {}  # embedding: the innermost model that has it
        for model in self.modules():
            if isinstance(model, PreTrainedModel):
                try:
                    owners[model.get_input_embeddings()] = model
                except NotImplementedError:  # the vision tower of Qwen3-VL
                    continue

        def require_grads(embedding: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            if any(param.requires_grad for param in owners[embedding].parameters()):
                output.requires_grad_(True)

        self._require_grads_hooks = [embedding.register_forward_hook(require_grads) for embedding in owners]

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | Path,
        *,
        reward_token_id: int,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        device_map: str | dict[str, Any] | None = None,
        seed: int = 0,
        head_hidden_sizes: tuple[int, ...] = (1024, 16),
        head_dropout: float = 0.05,
        log_std_min: float = -4.0,
        log_std_max: float = 3.0,
    ) -> "GaussianRewardModel":
        """
        Builds a reward model on a pretrained image-text model.

        Args:
            name_or_path (`str` or `Path`):
                Local folder or Hub id of a model that [`~transformers.AutoModelForImageTextToText`] loads.
            reward_token_id (`int`):
                [`SpatialScoreProcessor.reward_token_id`].
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Type of the backbone's weights; `"auto"` keeps the checkpoint's. Head and reward token are fp32.
            attn_implementation (`str`, *optional*):
                Attention function of the backbone.
            quantization_config (`~transformers.BitsAndBytesConfig`, *optional*):
                Quantizes the language model; the vision tower, the embedding and the head are left as they are.
            device_map (`str` or `dict`, *optional*):
                Devices of the backbone's parts. The head and the reward token follow their neighbors.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the head's initial weights. The global generator is not changed.
            head_hidden_sizes, head_dropout, log_std_min, log_std_max:
                See [`GaussianRewardModelConfig`].

        Returns:
            [`GaussianRewardModel`]: In evaluation mode, as `from_pretrained` does.

        Raises:
            `ValueError`: If the checkpoint lacks a weight of the backbone, or a weight is not a finite floating-point number;
            the message names it.
            [`~hub.safety.UnsafeRepositoryError`]: If the folder or repository holds pickles or code.
        """
        reference = find_reference(name_or_path, kind="model", revision=revision)
        check_repository(reference, kind="model")
        if quantization_config is not None:
            quantization_config = quantize_language_model_only(reference, quantization_config)
        # The whole image-text model is loaded, not its base: otherwise transformers does not translate the names of the
        # weights in official checkpoints.
        try:
            image_text_model, loading_info = AutoModelForImageTextToText.from_pretrained(
                reference.name,
                revision=reference.revision,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=quantization_config,
                device_map=device_map,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise ValueError(f"The weights of {reference} cannot be read ({error}). {DAMAGED}") from error
        prefix = image_text_model.base_model_prefix + "."
        check_no_missing_keys(reference.name, [key for key in loading_info["missing_keys"] if key.startswith(prefix)])
        if not hasattr(image_text_model.config, "quantization_config") or quantization_config is not None:
            folder = Path(cached_file(reference.name, "config.json", revision=reference.revision)).parent
            check_types(folder.glob("*.safetensors"))
        check_finite(reference.name, image_text_model.named_parameters())
        config = GaussianRewardModelConfig(
            backbone_config=image_text_model.config,
            reward_token_id=reward_token_id,
            head_hidden_sizes=head_hidden_sizes,
            head_dropout=head_dropout,
            log_std_min=log_std_min,
            log_std_max=log_std_max,
            backbone_revision=reference.revision,
            name_or_path=reference.name,
            attn_implementation=image_text_model.config._attn_implementation,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, backbone=image_text_model.base_model)
        model.backbone.get_input_embeddings().reset_reward_token()
        copy_loading_state(image_text_model, model)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        Loads a model saved whole with `save_pretrained`. Takes the arguments of
        [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            `ValueError`: If a weight is missing or not finite; the message names it.
        """
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, use_safetensors=True, **kwargs
        )
        check_no_missing_keys(pretrained_model_name_or_path, loading_info["missing_keys"])
        check_finite(pretrained_model_name_or_path, model.named_parameters())
        model.backbone.get_input_embeddings().base.requires_grad_(False)  # loading makes new, trainable parameters
        return (model, loading_info) if output_loading_info else model

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
    ) -> GaussianRewardOutput:
        """
        Scores a batch made by [`SpatialScoreProcessor`].

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids, with exactly one reward token per row.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding, which may be on either side.
            mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
                1 at image tokens, 0 elsewhere.
            pixel_values (`torch.Tensor` of shape `(total_patches, patch_dim)`):
                Patches of all images, one after another.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`):
                Frames, rows and columns of patches of each image.
            image_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Number of each row's image. If `None`, each row has its own.

        Returns:
            [`GaussianRewardOutput`]: Mean and log standard deviation of each row's score, in fp32.

        Raises:
            `ValueError`: If `mm_token_type_ids` is missing or a row does not hold exactly one reward token.
        """
        if mm_token_type_ids is None:
            raise ValueError(
                "`mm_token_type_ids` is missing. Without it some backbones silently number image tokens along one line "
                "and lose the layout of the image. Pass everything the processor returns."
            )
        is_reward_token = input_ids == self.config.reward_token_id  # (batch_size, sequence_length)
        num_reward_tokens = is_reward_token.sum(-1)
        if (num_reward_tokens != 1).any():
            raise ValueError(
                f"Every row needs exactly one reward token (id {self.config.reward_token_id}), got "
                f"{num_reward_tokens.tolist()}. Encode the batch with the model's own processor."
            )
        if pixel_values is None or image_grid_thw is None:
            raise ValueError("`pixel_values` or `image_grid_thw` is missing. Pass everything the processor returns.")
        with self._autocast():
            at_reward_token = encode_rows(
                self.backbone,
                is_reward_token,
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=image_grid_thw,
                image_index=torch.arange(len(input_ids)) if image_index is None else image_index,
            )  # (batch_size, hidden_size)
        mean, log_std = self.head(at_reward_token.to(next(self.head.parameters()).device))
        return GaussianRewardOutput(mean=mean, log_std=log_std)


def spatial_score_lora_config(rank: int = 64, alpha: int = 128, dropout: float = 0.05) -> LoraConfig:
    """
    LoRA as SpatialScore is trained here: adapters on all linear layers of the language model, head and reward token in
    full, vision tower frozen.

    Args:
        rank (`int`, *optional*, defaults to `64`):
            Rank of the adapters.
        alpha (`int`, *optional*, defaults to `128`):
            Scale of the adapters: their output is multiplied by `alpha / rank`.
        dropout (`float`, *optional*, defaults to `0.05`):
            Dropout on the adapters' input.

    Returns:
        [`~peft.LoraConfig`]: For a [`GaussianRewardModel`]; the saved adapter holds head and reward token too.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=r".*\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["head", "reward_token"],
    )


def keep_input_types(model: PreTrainedModel | PeftModel) -> None:
    """
    Keeps PEFT from casting the inputs of adapters on a half-precision backbone, up to 18,944 numbers per token, to fp32, which
    autocast would undo. The products stay the same, bit for bit.
    """
    if isinstance(model, PeftModel) and model.get_base_model().backbone.dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False


AutoConfig.register("gaussian_reward", GaussianRewardModelConfig)
AutoModel.register(GaussianRewardModelConfig, GaussianRewardModel)
