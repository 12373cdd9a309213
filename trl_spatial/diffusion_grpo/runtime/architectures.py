"""Pipelines without weights: their components, read from small JSON files and built on the meta device."""

import json
from contextlib import nullcontext
from importlib import import_module, resources
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import ConfigMixin
from torch import nn

from ...hub.errors import explain_errors
from ...hub.references import find_reference
from ..policies import DiffusionPolicy, make_policy


Architecture: TypeAlias = dict[str, Any]


def load_architecture(name: str, *, revision: str | None = None) -> Architecture:
    """
    Reads which models a pipeline consists of: its `"_class_name"`, and for each component `[library, class,
    configuration]`. `name` is a folder, or a pipeline on the Hub, from which only the small JSON files are downloaded;
    `black-forest-labs/FLUX.1-dev`, `Qwen/Qwen-Image`, `stabilityai/stable-diffusion-3.5-medium` and
    `Tongyi-MAI/Z-Image` ship with the package. Raises `ValueError` if there is no such folder or repository.
    """
    shipped = json.loads((resources.files(__package__) / "architectures.json").read_text(encoding="utf-8"))
    if name in shipped:
        return shipped[name]
    reference = find_reference(name, kind="model", revision=revision)

    def read(path: str) -> dict[str, Any]:
        if reference.is_local:
            return json.loads((Path(reference.name) / path).read_text(encoding="utf-8"))
        from huggingface_hub import hf_hub_download

        with explain_errors(f"Reading {path} of {reference}"):
            return json.loads(Path(hf_hub_download(reference.name, path, revision=reference.revision)).read_text())

    architecture: Architecture = {}
    for component, value in read("model_index.json").items():
        if component == "_class_name":
            architecture[component] = value
        elif isinstance(value, list) and value[0] is not None:
            library, class_name = value
            is_model = component in ("transformer", "vae") or component.startswith("text_encoder")
            file = "scheduler_config.json" if component == "scheduler" else "config.json"
            config = read(f"{component}/{file}") if is_model or component == "scheduler" else {}
            architecture[component] = [library, class_name, config]
    return architecture


def build_policy(architecture: Architecture, *, max_sequence_length: int) -> DiffusionPolicy:
    """Builds a policy whose models have no weights: all are on PyTorch's meta device."""
    components = {name: build_component(*value) for name, value in architecture.items() if name != "_class_name"}
    pipeline = getattr(import_module("diffusers"), architecture["_class_name"])(**components)
    pipeline.image_processor.postprocess = lambda images, **kwargs: []  # tensors on the meta device have no pixels
    return make_policy(pipeline, max_sequence_length=max_sequence_length)


def build_component(library: str, class_name: str, config: dict[str, Any]) -> Any:
    """Builds a component of a pipeline from its class and configuration: a model on PyTorch's meta device, without weights."""
    component_class = getattr(import_module(library), class_name)
    with torch.device("meta"):
        if issubclass(component_class, ConfigMixin):
            config = {key: value for key, value in config.items() if key != "quantization_config"}
            # a scheduler computes with real numbers
            with nullcontext() if issubclass(component_class, nn.Module) else torch.device("cpu"):
                return component_class.from_config(config)
        if issubclass(component_class, nn.Module):
            return component_class(component_class.config_class.from_dict(config))
        return component_class()  # a tokenizer, which is never used
