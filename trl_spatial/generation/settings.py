"""How each family of pipelines is called: the settings of its published models, their cost, and their license terms."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import hf_hub_download

from ..hub.errors import call_with_retries, explain_errors
from ..hub.references import Reference, find_reference
from ..hub.safety import read_settings


_INDEX = "model_index.json"


@dataclass(frozen=True)
class FamilySettings:
    """
    A family of text-to-image models that share a pipeline class.

    Args:
        name (`str`):
            Its usual name.
        pipeline_class (`str`):
            Class in diffusers. The `_class_name` in a pipeline's model_index.json says which family it belongs to.
        arguments (`Mapping[str, Any]`):
            Arguments of the pipeline's call besides prompts and generators. A recipe may change these and no others.
        repositories (`tuple[str, ...]`):
            The published models on the Hub that the rest describes. Other models of the same class may have other terms.
        licence (`str`):
            Name of their license.
        output_terms (`str`):
            What the license says about the use of images.
        seconds_per_image (`float`, *optional*):
            Time of one image with these arguments on an H100. `None` if it was never measured.
    """

    name: str
    pipeline_class: str
    arguments: Mapping[str, Any]
    repositories: tuple[str, ...]
    licence: str
    output_terms: str
    seconds_per_image: float | None = None

    def seconds(self, overrides: Mapping[str, Any]) -> float | None:
        """
        Estimates the time of one image on an H100, in proportion to the steps and to the pixels.

        Args:
            overrides (`Mapping[str, Any]`):
                Arguments that differ from the family's.
        """
        if self.seconds_per_image is None:
            return None
        arguments = {**self.arguments, **overrides}
        factor = 1.0
        for key in ("num_inference_steps", "height", "width"):
            factor *= arguments[key] / self.arguments[key]
        return self.seconds_per_image * factor


def _arguments(size: int, steps: int, **others: Any) -> Mapping[str, Any]:
    return MappingProxyType({"height": size, "width": size, "num_inference_steps": steps, **others})


FAMILIES = (
    FamilySettings(
        name="FLUX.1-dev",
        pipeline_class="FluxPipeline",
        arguments=_arguments(1024, 28, guidance_scale=3.5),
        repositories=("black-forest-labs/FLUX.1-dev",),
        licence="FLUX.1 [dev] Non-Commercial License",
        output_terms="Images may be used for any purpose but to train a model that competes with FLUX.1 [dev].",
        seconds_per_image=5.0,
    ),
    FamilySettings(
        name="Qwen-Image",
        pipeline_class="QwenImagePipeline",
        # without a negative prompt the pipeline ignores true_cfg_scale
        arguments=_arguments(1024, 50, true_cfg_scale=4.0, negative_prompt=" "),
        repositories=("Qwen/Qwen-Image",),
        licence="Apache-2.0",
        output_terms="No terms for images.",
        seconds_per_image=20.0,
    ),
    FamilySettings(
        name="HunyuanImage-2.1",
        pipeline_class="HunyuanImagePipeline",
        arguments=_arguments(2048, 50, distilled_guidance_scale=3.25),
        repositories=(
            "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
            "hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers",
        ),
        licence="Tencent Hunyuan Community License",
        output_terms=(
            "Images may not be used to improve models other than Tencent Hunyuan's, and the license does not extend to the "
            "European Union, the United Kingdom and South Korea."
        ),
    ),
    FamilySettings(
        name="Z-Image",
        pipeline_class="ZImagePipeline",
        arguments=_arguments(1024, 50, guidance_scale=5.0),
        repositories=("Tongyi-MAI/Z-Image",),
        licence="Apache-2.0",
        output_terms="No terms for images.",
    ),
    FamilySettings(
        name="SD3.5",
        pipeline_class="StableDiffusion3Pipeline",
        arguments=_arguments(1024, 40, guidance_scale=4.5),
        repositories=("stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-medium"),
        licence="Stability AI Community License",
        output_terms=(
            "Images may not be used to create or improve a foundational generative model. Free below 1 million USD of annual "
            "revenue."
        ),
    ),
)


def settings_for(name_or_path: str | Path, *, revision: str | None = None) -> FamilySettings:
    """
    Returns the settings of a pipeline's family. Only its small index is read.

    Args:
        name_or_path (`str` or `Path`):
            A folder, `org/name` or `org/name@revision` on the Hub, or `hub/NAME` for one of your own.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Raises:
        `ValueError`: If there is no such pipeline, or its class belongs to no family; the message lists them.
        [`~hub.errors.HubError`]: If the Hub does not give its index.
    """
    return find_pipeline(name_or_path, revision=revision)[1]


def find_pipeline(name_or_path: str | Path, *, revision: str | None = None) -> tuple[Reference, FamilySettings]:
    """
    Finds a pipeline and the settings of its family.

    Args:
        name_or_path (`str` or `Path`), revision (`str`, *optional*):
            As for [`settings_for`].

    Returns:
        `tuple`: where it is, at a commit if it is on the Hub, so that whatever is read later is consistent; and the
        settings.

    Raises:
        As [`settings_for`].
    """
    reference = find_reference(name_or_path, kind="model", revision=revision)
    if reference.is_local:
        index = Path(reference.name) / _INDEX
        if not index.is_file():
            raise ValueError(f"{reference} is not the folder of a pipeline: it has no {_INDEX}.")
    else:
        with explain_errors(f"Reading the index of {reference}"):
            index = Path(call_with_retries(hf_hub_download, reference.name, _INDEX, revision=reference.revision))
        reference = replace(reference, revision=index.parent.name)  # the cache names the folder after the commit
    class_name = read_settings(index).get("_class_name")
    for family in FAMILIES:
        if family.pipeline_class == class_name:
            return reference, family
    known = ", ".join(f"{family.pipeline_class} ({family.name})" for family in FAMILIES)
    raise ValueError(
        f"{reference} is a pipeline of the class {class_name!r}, for which there are no settings. Use one of the classes "
        f"{known}."
    )


def published_family(name: str) -> FamilySettings | None:
    """
    Returns the family whose published model has this name on the Hub, without asking the Hub: for estimates and licenses.

    Args:
        name (`str`):
            Such as `"Qwen/Qwen-Image"`, with or without `@revision`.
    """
    repository = name.partition("@")[0]
    return next((family for family in FAMILIES if repository in family.repositories), None)
