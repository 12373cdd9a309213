"""What training saves: weights for users, and state to resume from."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from transformers.trainer import OPTIMIZER_NAME

from .ema import EMA
from .sharding import fill_tensor, gather_tensors


TRANSFORMER_FOLDER = "transformer"
TRAINED_WEIGHTS = "trained_weights.safetensors"
EMA_WEIGHTS = "ema.safetensors"
SHARDED_OPTIMIZER = "optimizer.bin"  # accelerate's name
# Fields of a `LoraConfig`, and the values with which an adapter only adds matrices to unchanged weights. Other initializations,
# such as PiSSA's, change the frozen weights, which are also the reference policy.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (None,),
    "target_parameters": (None,),
    "init_lora_weights": ("gaussian", "orthogonal", True, False),
}


# Weights for users


def check_exportable(peft_config: LoraConfig) -> None:
    """
    Checks before training that diffusers will be able to load the trained adapter. Raises `ValueError` if the adapter
    trains something that `load_lora_weights` drops or refuses.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"`peft_config` is a `{type(peft_config).__name__}`. Diffusion pipelines load LoRA weights: use a "
            "`LoraConfig`."
        )
    for field, allowed in _PLAIN_LORA.items():
        value = getattr(peft_config, field)
        if value not in allowed:
            raise ValueError(
                f"`peft_config.{field}` is {value!r}, but a diffusion pipeline's `load_lora_weights` adds the matrices of "
                f"plain LoRA to unchanged weights. Set it to {' or '.join(map(repr, allowed))}, or train all weights "
                "without `peft_config`."
            )


def export_weights(
    pipeline: DiffusionPipeline,
    transformer: Any,
    folder: str | Path,
    *,
    ema: EMA | None = None,
    is_writer: bool = True,
) -> None:
    """
    Saves the trained weights, or with `ema` their average, so that users load them with diffusers alone:
    `pipeline.load_lora_weights(folder)` for an adapter, or `from_pretrained(folder, subfolder="transformer")` of the
    transformer's class, such as `FluxTransformer2DModel`, for a fully trained model.

    The scale of an adapter, `alpha / r` or whatever its configuration says, is multiplied into its second matrices, so
    diffusers loads the file with scale 1, even as a state dict, which carries no metadata.

    Only `is_writer` writes. Other processes have to call this only if the transformer is sharded. Pass the transformer
    without the wrappers of distributed training.
    """
    with nullcontext() if ema is None else ema.applied():
        if not has_adapter(transformer):
            _export_transformer(transformer, Path(folder) / TRANSFORMER_FOLDER, is_writer)
            return
        (adapter_name,) = transformer.active_adapters()
        layers = gather_tensors(get_peft_model_state_dict(transformer, adapter_name=adapter_name), is_writer=is_writer)
        if is_writer:
            for name, weight in layers.items():
                layer, is_second, _ = name.partition(".lora_B.")
                if is_second:
                    weight *= transformer.get_submodule(layer).scaling[adapter_name]
            pipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def _export_transformer(transformer: Any, folder: Path, is_writer: bool) -> None:
    is_sharded = isinstance(transformer, FSDPModule)
    if not is_sharded:
        if is_writer:
            transformer.save_pretrained(folder)
        return
    weights = gather_tensors(transformer.state_dict(), is_writer=is_writer)
    if is_writer:
        # The original class: `fully_shard` puts its own in front of it.
        whole_class: Any = next(base for base in type(transformer).__mro__ if not issubclass(base, FSDPModule))
        with torch.device("meta"):
            whole = whole_class.from_config(transformer.config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(folder)


def has_adapter(transformer: torch.nn.Module) -> bool:
    """Returns whether a diffusers transformer has adapters."""
    return bool(getattr(transformer, "peft_config", None))


# State to resume from


def save_trained_state(
    transformer: torch.nn.Module, folder: str | Path, *, ema: EMA | None = None, is_writer: bool = True
) -> None:
    """
    Saves what training changes in a transformer, bit for bit: its trainable parameters, in their own dtype, and their
    moving average. Frozen weights are not saved. `transformer` and `is_writer` are as for [`export_weights`].
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    _save_tensors(_trainable_parameters(transformer), Path(folder) / TRAINED_WEIGHTS, is_writer=is_writer)
    if ema is not None:
        save_average(ema, Path(folder) / EMA_WEIGHTS, is_writer=is_writer)


def load_trained_state(transformer: torch.nn.Module, folder: str | Path, *, ema: EMA | None = None) -> None:
    """
    Loads what [`save_trained_state`] saved into a transformer with the same setup. Raises `ValueError` if the saved
    parameters are not its trainable ones, or a file is missing.
    """
    saved, _ = _load_tensors(Path(folder) / TRAINED_WEIGHTS)
    parameters = _trainable_parameters(transformer)
    _check_same_tensors(saved, parameters, Path(folder) / TRAINED_WEIGHTS)
    for name, parameter in parameters.items():
        fill_tensor(parameter, saved[name])
    if ema is not None:
        load_average(ema, Path(folder) / EMA_WEIGHTS)


def save_average(average: EMA, path: Path, *, is_writer: bool = True) -> None:
    """Saves an average of the trained weights, bit for bit; `is_writer` is as for [`export_weights`]."""
    _save_tensors(average.weights, path, {"num_updates": average.num_updates}, is_writer=is_writer)


def load_average(average: EMA, path: Path) -> None:
    """Loads what [`save_average`] saved. Raises `ValueError` if the saved weights are of other parameters."""
    saved, extra = _load_tensors(path)
    _check_same_tensors(saved, average.weights, path)
    average.load_state_dict({"weights": saved, "num_updates": extra["num_updates"]})


def save_buffer(buffer: Mapping[str, torch.Tensor], extra: Mapping[str, Any], folder: str | Path, rank: int) -> None:
    """
    Saves what one process has to remember, such as the part of a rollout that it has not trained on yet: tensors of any
    shape and dtype, exactly, and `extra`, anything that JSON can hold. Each process saves its own file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    _save_tensors(buffer, Path(folder) / f"buffer_{rank}.safetensors", extra)


def load_buffer(folder: str | Path, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Loads what [`save_buffer`] saved: the tensors, on the CPU, and the rest. Raises `ValueError` if that process saved
    none.
    """
    return _load_tensors(Path(folder) / f"buffer_{rank}.safetensors")


def num_buffers(folder: str | Path) -> int:
    """Number of processes that saved the checkpoint in a folder."""
    return len(list(Path(folder).glob("buffer_*.safetensors")))


def _trainable_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, extra: Mapping[str, Any] | None = None, *, is_writer: bool = True
) -> None:
    # Copies: safetensors refuses tensors that share memory, such as slices of one rollout.
    copies = gather_tensors(tensors, is_writer=is_writer)
    if is_writer:
        save_file(copies, path, metadata={"extra": json.dumps(dict(extra or {}))})


def _load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: it was saved by another setup (number of processes, `ema_decay`, or the trainer's "
            "version). Resume with the setup of that run, or start again without `resume_from_checkpoint`."
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
        extra = json.loads(file.metadata()["extra"])
    return tensors, extra


def _check_same_tensors(saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], path: Path) -> None:
    def describe(tensors: Mapping[str, torch.Tensor]) -> set[str]:
        return {f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}

    only_saved, only_own = sorted(describe(saved) - describe(own)), sorted(describe(own) - describe(saved))
    if only_saved or only_own:
        raise ValueError(
            f"{path} is of another model: {len(only_saved)} of its tensors are not trainable parameters here (the first: "
            f"{only_saved[:1]}), {len(only_own)} are missing in it (the first: {only_own[:1]}). Resume with the "
            "`peft_config` and the dtype of that run."
        )


def check_sharding(folder: str | Path, *, is_sharded: bool) -> None:
    """
    Refuses a checkpoint whose optimizer state is sharded when training is not, or the other way round. transformers and
    accelerate each look for a file under their own name, and silently continue without one.
    """
    own, other = (SHARDED_OPTIMIZER, OPTIMIZER_NAME) if is_sharded else (OPTIMIZER_NAME, SHARDED_OPTIMIZER)
    if (Path(folder) / other).exists() and not (Path(folder) / own).exists():
        then, now = ("whole", "sharded (FSDP2)") if is_sharded else ("sharded (FSDP2)", "whole")
        raise ValueError(
            f"The checkpoint {folder} was saved with {then} weights, and now they are {now}. Resume with the launch "
            "configuration of that run."
        )
