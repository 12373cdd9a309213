"""Painters of the images of jobs: a diffusers pipeline, a renderer of scenes, or a model behind a server."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import __version__
from ..hub.errors import explain_errors
from ..hub.references import find_reference
from ..hub.safety import check_repository
from ..preferences.images import load_image
from ..scenes import LayoutError
from .generators import ImageGenerator, SceneGenerator, TabletopGenerator
from .jobs import DrawnImage, ImageJob, Painter, describe_noise, encode_png, versions
from .seeds import image_generator
from .settings import FAMILIES, FamilySettings, find_pipeline, published_family


# Renderers, which draw without a model, by their name in a recipe. Each takes an image size in pixels.
RENDERERS: dict[str, Callable[..., ImageGenerator]] = {"flat": SceneGenerator, "tabletop": TabletopGenerator}
DTYPES = ("float32", "bfloat16", "float16")
FLAGGED = "The image was marked as not safe for work."
_NUM_ENCODED_PROMPTS = 4  # the prompt being drawn, the negative prompt, and room for a batch's
_SEED_OF_SERVERS = 2**31  # image servers take seeds of 31 bits


class PipelinePainter(Painter):
    """
    Draws with a text-to-image pipeline of diffusers, which is loaded when the first image is drawn.

    With a batch size of 1 an image is the same, bit for bit, whatever else is drawn. In larger batches its last bits depend
    on how many images are drawn with it, and large models gain next to nothing from them.

    Args:
        name_or_path (`str` or `Path`):
            A folder, `org/name` or `org/name@revision` on the Hub, or `hub/NAME` for one of your own.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        device (`str`, *optional*):
            Where to draw. If `None`, on the GPU if there is one. The noise is always drawn on the CPU.
        batch_size (`int`, *optional*, defaults to `1`):
            Images that are drawn together.
        lora (`str`, *optional*):
            LoRA weights to draw with, such as `trl_spatial grpo` writes: a folder, or a name on the Hub as for the pipeline.
        **overrides:
            Arguments of the pipeline's call that differ from its family's in `FAMILIES`, such as `num_inference_steps`.

    Raises:
        `ValueError`: If a value is unknown, or, when the pipeline is loaded, the family takes no such argument, there is no
        such pipeline, or its repository holds pickles or code.
        `ImportError`: When the pipeline is loaded, if diffusers is not installed.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        revision: str | None = None,
        *,
        dtype: str = "bfloat16",
        device: str | None = None,
        batch_size: int = 1,
        lora: str | None = None,
        **overrides: Any,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}. Use one of {', '.join(DTYPES)}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}. It must be at least 1.")
        family = published_family(str(name_or_path))
        if family is not None:
            _merge(family, overrides)  # an error now rather than after the download
        # only the name of a local folder: recipes are published, and the rest of the path is nobody's business
        self.name = Path(name_or_path).resolve().name if Path(name_or_path).exists() else str(name_or_path)
        self.batch_size = batch_size
        self.uses_gpu = device is None or device.startswith("cuda")
        self._source = (name_or_path, revision)
        self._lora = lora
        self._dtype = dtype
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._overrides = overrides
        self._pipeline: Any = None

    def stream(self, jobs: Iterable[ImageJob]) -> Iterator[DrawnImage]:
        for batch in _batched(jobs, self.batch_size):
            if self._pipeline is None:
                self._load()
            try:
                drawn = self._draw_batch(batch)
            except Exception as error:  # whatever a model raises, the error has to name the image
                raise self.error(batch, error) from error
            yield from drawn

    def _load(self) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise ImportError('Pipelines need diffusers: `pip install "trl-spatial[diffusion]"`.') from error

        name_or_path, revision = self._source
        reference, family = find_pipeline(name_or_path, revision=revision)
        self._arguments = _merge(family, self._overrides)
        check_repository(reference, kind="model")
        with explain_errors(f"Loading the pipeline {reference}"):
            pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
                reference.name,
                revision=reference.revision,
                dtype=getattr(torch, self._dtype),
                use_safetensors=True,
            )
        adapter = None if self._lora is None else _load_lora(pipeline, self._lora)
        pipeline.to(self._device)
        pipeline.set_progress_bar_config(disable=True)
        # The call of every pipeline encodes through this method, so its images stay the same.
        pipeline.encode_prompt = _Memory(pipeline.encode_prompt, _NUM_ENCODED_PROMPTS)
        self._recipe = {
            "model": self.name.partition("@")[0],
            "revision": reference.revision,
            "lora": adapter,
            "pipeline": family.pipeline_class,
            "scheduler": type(pipeline.scheduler).__name__,
            **self._arguments,
            "dtype": self._dtype,
            "device": _describe(self._device),
            "batch_size": self.batch_size,
            **versions("torch", "diffusers", "transformers"),
        }
        self._pipeline = pipeline

    def _draw_batch(self, jobs: list[ImageJob]) -> list[DrawnImage]:
        arguments = dict(self._arguments)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(jobs)
        noises = [image_generator(job.seed) for job in jobs]
        start = time.perf_counter()
        with _one_thread(self._device):
            output = self._pipeline(prompt=[job.prompt for job in jobs], generator=noises, **arguments)
        seconds = (time.perf_counter() - start) / len(jobs)
        flags = output.get("nsfw_content_detected") or [False] * len(jobs)
        drawn = []
        for job, noise, image, is_flagged in zip(jobs, noises, output.images, flags, strict=True):
            # with the image's actual size: some pipelines round
            recipe = {**self._recipe, "width": image.width, "height": image.height, **describe_noise(job, noise)}
            png, refusal = (None, FLAGGED) if is_flagged else (encode_png(image), None)
            drawn.append(DrawnImage(job.id, png, refusal, recipe, seconds, 0.0))
        return drawn


def _load_lora(pipeline: Any, name: str) -> str:
    """Loads LoRA weights into a pipeline, and returns their public name, which for a folder omits the rest of the path."""
    reference = find_reference(name, kind="model")
    check_repository(reference, kind="model")
    with explain_errors(f"Loading the LoRA weights {reference}"):
        pipeline.load_lora_weights(reference.name, revision=reference.revision, use_safetensors=True)
    return Path(name).resolve().name if reference.is_local else str(reference)


class RendererPainter(Painter):
    """
    Draws with a renderer of scenes, on one core of the CPU. A scene that no arrangement satisfies is a refusal.

    Args:
        world ([`~generation.generators.ImageGenerator`]):
            The renderer, such as [`~generation.generators.SceneGenerator`].
    """

    batch_size = 32  # takes a fraction of a second

    def __init__(self, world: ImageGenerator):
        self.world = world
        self.name = type(world).__name__

    def stream(self, jobs: Iterable[ImageJob]) -> Iterator[DrawnImage]:
        for job in jobs:
            noise = image_generator(job.seed)
            recipe: dict[str, Any] = {
                "renderer": self.name,
                "device": "cpu",
                **describe_noise(job, noise),
                "trl-spatial": __version__,
                **versions("torch", "numpy", "pillow"),
            }
            start = time.perf_counter()
            try:
                (image,) = self.world([job.prompt], [noise])
                png, refusal = encode_png(image), None
                recipe |= {"width": image.width, "height": image.height}
            except LayoutError as error:
                png, refusal = None, str(error)
            except Exception as error:  # whatever a renderer raises, the error has to name the image
                raise self.error([job], error) from error
            yield DrawnImage(job.id, png, refusal, recipe, time.perf_counter() - start, 0.0)


class ImageEndpoint(Protocol):
    """The part of [`~endpoints.Endpoint`] that draws."""

    model: str
    concurrency: int

    def draw(self, prompt: str, *, size: str, seed: int | None, extra_body: Mapping[str, Any] | None) -> Any:
        """Draws one image: an [`~endpoints.Drawing`]."""
        ...

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Runs a function on threads; yields the number of each item, and what the function returned or raised for it."""
        ...


class EndpointPainter(Painter):
    """
    Draws with a model behind a server. A refusal is an answer, and is recorded.

    Args:
        endpoint ([`~endpoints.Endpoint`]):
            The server.
        size (`str`, *optional*, defaults to `"1024x1024"`):
            Width and height in pixels that are asked for. The recipe records those of the image.
        extra_body (`dict`, *optional*):
            Further fields of every request, such as `{"watermark": False}`.
    """

    def __init__(self, endpoint: ImageEndpoint, size: str = "1024x1024", extra_body: Mapping[str, Any] | None = None):
        self.endpoint = endpoint
        self.size = size
        self.extra_body = dict(extra_body or {})
        self.name = endpoint.model
        self.batch_size = 4 * endpoint.concurrency  # so that few of the calls wait for the slowest

    def stream(self, jobs: Iterable[ImageJob]) -> Iterator[DrawnImage]:
        failed: tuple[ImageJob, Exception] | None = None
        asked: list[ImageJob] = []

        def ask_until_failure() -> Iterator[ImageJob]:
            for job in jobs:
                if failed is not None:
                    return
                asked.append(job)
                yield job

        for index, result in self.endpoint.map(self._ask, ask_until_failure()):
            if not isinstance(result, Exception):
                yield result
            elif failed is None:
                failed = asked[index], result
        if failed is not None:
            raise self.error([failed[0]], failed[1]) from failed[1]

    def _ask(self, job: ImageJob) -> DrawnImage:
        seed = job.seed % _SEED_OF_SERVERS
        start = time.perf_counter()
        drawing = self.endpoint.draw(job.prompt, size=self.size, seed=seed, extra_body=self.extra_body)
        recipe = {
            "model": self.name,
            "served_model": drawing.served_model,
            "size": self.size,
            "extra_body": self.extra_body,
            "seed": drawing.seed,
            **versions("openai"),
        }
        png, refusal = None, drawing.refusal
        if drawing.is_flagged:
            refusal = FLAGGED
        elif refusal is None:
            image = load_image(drawing.image_bytes)
            png = encode_png(image)
            recipe |= {"width": image.width, "height": image.height}
        return DrawnImage(job.id, png, refusal, recipe, time.perf_counter() - start, drawing.cost)


_NUMBER = (int, float)
_ENDPOINT_KEYS: dict[str, Any] = {
    "endpoint": str,
    "model": str,
    "api_key_env": str,
    "extra_body": dict,
    "price_per_image": _NUMBER,
    "size": str,
    "concurrency": int,
    "timeout_s": _NUMBER,
}
_RENDERER_KEYS: dict[str, Any] = {"name": str, "image_size": int}
_PIPELINE_KEYS: dict[str, Any] = {
    "name": str,
    "revision": str,
    "dtype": str,
    "device": str,
    "batch_size": int,
    "lora": str,
} | {
    key: _NUMBER if isinstance(value, float) else type(value)
    for family in FAMILIES
    for key, value in family.arguments.items()
}


def make_painter(spec: Mapping[str, Any]) -> Painter:
    """
    Makes the painter of a recipe's entry. No model is loaded yet.

    Args:
        spec (`Mapping[str, Any]`):
            A renderer, `{"name": "tabletop", "image_size": 128}` or `"flat"`; a pipeline, `{"name":
            "black-forest-labs/FLUX.1-dev"}` with any of `revision`, `dtype`, `device`, `batch_size`, `lora` and the arguments of its
            family in `FAMILIES`; or a model behind a server, `{"endpoint": "https://HOST/v1", "model": NAME}` with any of
            `api_key_env`, `extra_body`, `price_per_image` (US dollars), `size`, `concurrency` and `timeout_s`.

    Raises:
        `ValueError`: If a key is unknown or missing, or a value is of the wrong type or out of range.
        `ImportError`: If a server is named and the `openai` package is missing.
    """
    kind = check_spec(spec)
    settings = dict(spec)
    if kind == "endpoint":
        return _make_endpoint_painter(settings)
    if kind == "renderer":
        return RendererPainter(RENDERERS[settings.pop("name")](**settings))
    return PipelinePainter(settings.pop("name"), **settings)


def check_spec(spec: Mapping[str, Any]) -> str:
    """
    Checks the keys of a recipe's entry and the types of their values.

    Args:
        spec (`Mapping[str, Any]`):
            As for [`make_painter`].

    Returns:
        `str`: What the entry is: `"endpoint"`, `"renderer"` or `"pipeline"`.

    Raises:
        `ValueError`: If a key is unknown or missing, or a value is of the wrong type.
    """
    if "endpoint" in spec:
        _check(spec, _ENDPOINT_KEYS, required="model")
        return "endpoint"
    is_renderer = spec.get("name") in RENDERERS
    _check(spec, _RENDERER_KEYS if is_renderer else _PIPELINE_KEYS, required="name")
    return "renderer" if is_renderer else "pipeline"


def _make_endpoint_painter(spec: Mapping[str, Any]) -> EndpointPainter:
    from ..endpoints import Endpoint, Prices  # imports the client only if there is a server to ask

    given = {key: spec[key] for key in ("api_key_env", "concurrency", "timeout_s") if key in spec}
    prices = Prices(per_image=spec.get("price_per_image", 0.0))
    endpoint = Endpoint(spec["model"], base_url=spec["endpoint"], prices=prices, **given)
    return EndpointPainter(endpoint, **{key: spec[key] for key in ("size", "extra_body") if key in spec})


def _check(spec: Mapping[str, Any], keys: Mapping[str, Any], required: str) -> None:
    if required not in spec:
        raise ValueError(f"The generator {dict(spec)} lacks `{required}`.")
    for key, value in spec.items():
        if key not in keys:
            raise ValueError(
                f"The generator {_label(spec)} has the unknown key {key!r}. Available: {', '.join(keys)}."
            )
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            kinds = keys[key] if isinstance(keys[key], tuple) else (keys[key],)
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"`{key}` of the generator {_label(spec)} is {value!r}. It must be of the type {wanted}.")


def _label(spec: Mapping[str, Any]) -> str:
    return str(spec.get("name") or spec.get("model"))


def _merge(family: FamilySettings, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(overrides.keys() - family.arguments.keys()):
        raise ValueError(
            f"Pipelines of {family.name} do not take `{unknown[0]}`. They take {', '.join(family.arguments)}."
        )
    return {**family.arguments, **overrides}


class _Memory:
    """Caches the results of a function for the arguments that were used last."""

    def __init__(self, function: Callable[..., Any], size: int):
        self.function, self.size = function, size
        self.values: dict[str, Any] = {}  # the least recently used first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        value = self.values.pop(key) if key in self.values else self.function(*args, **kwargs)
        self.values[key] = value
        if len(self.values) > self.size:
            del self.values[next(iter(self.values))]
        return value


def _batched(jobs: Iterable[ImageJob], size: int) -> Iterator[list[ImageJob]]:
    batch: list[ImageJob] = []
    for job in jobs:
        batch.append(job)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    # On the CPU, sums depend on the number of threads, so images would depend on the machine.
    if device.type != "cpu":
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _describe(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
