"""Scores images with a trained reward model: loading, batching, saving, merging."""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import BatchFeature, BitsAndBytesConfig

from ..hub.cards import Card
from ..preferences.images import load_image, open_image
from .checkpoints import find_checkpoint, fingerprint, load_adapter, save_checkpoint
from .modeling import GaussianRewardModel, GaussianRewardModelConfig
from .processing import SpatialScoreProcessor, load_processor


# Number of rows from which a progress bar is shown
PROGRESS_FROM = 200
# Maximum number of tokens per forward pass on a CPU: for tensors of more than a few megabytes, the system maps new memory, page
# by page, in every operation.
MAX_CPU_TOKENS = 4096

T = TypeVar("T")
Batch = tuple[list[int], BatchFeature]  # row numbers, and the model's inputs


class SpatialScores(NamedTuple):
    """
    Scores of a list of rows, in their order.

    Args:
        mean (`np.ndarray` of shape `(n,)`):
            Mean of each score, float32. Higher is better; a difference of two means is a logit of preference.
        std (`np.ndarray` of shape `(n,)`):
            Standard deviation of each score, float32, positive. It is a learned spread within the pairs of the training
            data, not a measure of the model's confidence: on images unlike them it may be just as small.
    """

    mean: np.ndarray
    std: np.ndarray


class SpatialScore:
    """
    Scores how well images match the spatial relations in their prompts.

    Args:
        model ([`GaussianRewardModel`] or [`~peft.PeftModel`]):
            The reward model, with or without adapters. It is put into evaluation mode.
        processor ([`SpatialScoreProcessor`]):
            The processor it was trained with.
        sample (`bool`, *optional*, defaults to `False`):
            What a call returns as the reward: the mean of each score, or a draw from its Gaussian.
        generator (`torch.Generator`, *optional*):
            CPU generator for those draws. If `None`, PyTorch's global one.

    Example:

    ```python
    >>> scorer = SpatialScore.from_pretrained("org/SpatialScore-7B")
    >>> mean, std = scorer.score(["a red cube left of a blue sphere"], ["cube.png"])
    ```
    """

    def __init__(
        self,
        model: GaussianRewardModel | PeftModel,
        processor: SpatialScoreProcessor,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ):
        self.model = model.eval()
        self.processor = processor
        self.sample = sample
        self.generator = generator
        self.card: Card | None = None  # the record of its training
        self.fingerprint: str | None = None  # of the files it was loaded from
        self.__name__ = "spatial_score"  # the name under which trainers log it

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        backbone: str | Path | None = None,
        attn_implementation: str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> "SpatialScore":
        """
        Loads a reward model: a folder or a Hub repository with an adapter, or with a whole (merged or fully trained)
        model.

        Args:
            name_or_path (`str` or `Path`):
                Local folder, `org/name` or `org/name@revision` on the Hub, or `hub/NAME` for your own model.
            revision (`str`, *optional*):
                Branch, tag or commit of the Hub repository.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Type of the backbone's weights; `"auto"` keeps the checkpoint's. Head and reward token are fp32.
            device (`str` or `torch.device`, *optional*):
                Where to score. If `None`, the accelerator if there is one.
            backbone (`str` or `Path`, *optional*):
                Folder or Hub id of the model the adapter was trained on, if it has moved.
            attn_implementation (`str`, *optional*):
                Attention function of the backbone.
            quantization_config (`~transformers.BitsAndBytesConfig`, *optional*):
                Quantizes the language model of an adapter's backbone.
            sample, generator:
                See [`SpatialScore`].

        Raises:
            `ValueError`: If the folder is not a reward model; the message lists what is missing. If a repository on the Hub
                holds pickles or code.
            `HubError`: If a repository is not there, may not be read, or cannot be reached.
        """
        folder = find_checkpoint(name_or_path, revision)
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        processor = load_processor(folder)
        config = GaussianRewardModelConfig.from_pretrained(folder)
        if processor.reward_token_id != config.reward_token_id:
            raise ValueError(
                f"{name_or_path} mixes two models: its tokenizer gives the reward token id {processor.reward_token_id}, "
                f"its config.json {config.reward_token_id}."
            )
        if (folder / "adapter_config.json").is_file():
            model: Any = load_adapter(
                folder,
                config,
                backbone,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization_config=quantization_config,
                device_map=None if quantization_config is None else {"": device},
            )
        elif quantization_config is not None or backbone is not None:
            raise ValueError(
                f"{name_or_path} is a whole model: `backbone` and `quantization_config` are for adapters."
            )
        else:
            model = GaussianRewardModel.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation)
        if quantization_config is None:
            model = model.to(device)
        scorer = cls(model, processor, sample=sample, generator=generator)
        scorer.card = Card.load(folder)
        scorer.fingerprint = fingerprint(folder, str(dtype), str(backbone or ""))
        return scorer

    def score(
        self,
        prompts: list[str],
        images: list[Any],
        *,
        batch_size: int = 8,
        show_progress: bool | None = None,
    ) -> SpatialScores:
        """
        Scores (prompt, image) rows. A row's score does not depend on its batch.

        Args:
            prompts (`list[str]`):
                One caption per row.
            images (`list`):
                One image per row: PIL images, local paths, bytes, or rows of an undecoded [`~datasets.Image`] column.
                They are decoded batch by batch, each in a thread while the model runs on the previous one.
            batch_size (`int`, *optional*, defaults to `8`):
                Maximum number of rows per forward pass. On a CPU, long rows use smaller batches, which is faster there. Rows of
                similar length share a batch.
            show_progress (`bool`, *optional*):
                Whether to show a progress bar. If `None`, for 200 rows or more.

        Returns:
            [`SpatialScores`]: Mean and standard deviation of each row's score, in the order of the input. It unpacks:
            `mean, std = scorer.score(prompts, images)`.

        Raises:
            `ValueError`: If the lists differ in length or a row cannot be read; the message names the row.
        """
        with closing(ahead(self.prepare(prompts, images, batch_size=batch_size))) as batches:
            return self.score_batches(batches, len(prompts), show_progress=show_progress)

    def prepare(self, prompts: list[str], images: list[Any], *, batch_size: int = 8) -> Iterator[Batch]:
        """
        Yields the row numbers and the model's inputs, batch by batch: the part of scoring that needs no model. Arguments and
        errors are those of [`~SpatialScore.score`].
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(
                f"Got {1 if isinstance(prompts, str) else len(prompts)} prompts and {len(images)} images. Pass two lists "
                "of one length; repeat a prompt that goes with several images."
            )
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(
                    f"prompts[{row}] is a {type(prompt).__name__}, not a string. The order is prompts, images."
                )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        num_tokens = self.processor.num_tokens(prompts, [_image_size(row, image) for row, image in enumerate(images)])
        # Longest first, so that too little memory shows at once.
        order = sorted(range(len(prompts)), key=lambda row: -num_tokens[row])
        while order:
            size = batch_size
            if self.model.device.type == "cpu":
                size = min(size, max(1, MAX_CPU_TOKENS // num_tokens[order[0]]))
            rows, order = order[:size], order[size:]
            chosen = [images[row] for row in rows]  # kept alive: a dataset column makes a new object at every access
            decoded: dict[int, Any] = {}  # an image that several rows share is decoded, and encoded, once
            for row, image in zip(rows, chosen, strict=True):
                if id(image) not in decoded:
                    decoded[id(image)] = _decode(row, image)
            yield rows, self.processor([prompts[row] for row in rows], [decoded[id(image)] for image in chosen])

    def score_batches(
        self, batches: Iterable[Batch], num_rows: int, *, show_progress: bool | None = None
    ) -> SpatialScores:
        """Scores the batches of [`~SpatialScore.prepare`], which have `num_rows` rows in total."""
        mean, log_std = torch.zeros(num_rows), torch.zeros(num_rows)
        is_quiet = num_rows < PROGRESS_FROM if show_progress is None else not show_progress
        with tqdm(total=num_rows, desc="Scoring", unit="image", disable=is_quiet) as progress:
            for rows, batch in batches:
                with torch.inference_mode():
                    output = self.model(**batch.to(self.model.device))
                mean[rows], log_std[rows] = output.mean.cpu(), output.log_std.cpu()
                for row in rows:
                    if not (mean[row].isfinite() and log_std[row].isfinite()):
                        raise ValueError(
                            f"images[{row}] has a score that is not finite, {mean[row]}: score it in float32, or check the model."
                        )
                progress.update(len(rows))
        return SpatialScores(mean.numpy(), log_std.exp().numpy())

    def __call__(self, prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        """
        The reward function that TRL's trainers call: for each row the mean of its score, or a draw from its Gaussian if the scorer
        was built with `sample=True`. Other columns of the dataset are ignored.
        """
        scores = self.score(prompts, images, show_progress=False)
        if not self.sample:
            return scores.mean.tolist()
        noise = torch.randn(len(prompts), generator=self.generator)
        return (torch.from_numpy(scores.mean) + torch.from_numpy(scores.std) * noise).tolist()

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Saves the model and its processor: an adapter with head and reward token, or the whole model if it has no
        adapter.

        Args:
            folder (`str` or `Path`):
                Output folder; created if missing.
        """
        save_checkpoint(self.model, self.processor, folder)
        if self.card is not None:
            self.card.save(folder)

    def merge(self, folder: str | Path) -> None:
        """
        Folds the adapter into the backbone and saves a model that needs neither adapter nor PEFT. The scorer holds the
        merged model afterwards.

        In fp32 scores stay the same to 1e-5. In bf16 the merged weights are rounded: for equal scores load the adapter
        with `dtype="float32"` before merging.

        Args:
            folder (`str` or `Path`):
                Output folder; created if missing.

        Raises:
            `ValueError`: If there is no adapter, or the backbone is quantized.
        """
        if not isinstance(self.model, PeftModel):
            raise ValueError("There is no adapter to merge: this model is already whole. `save_pretrained` copies it.")
        if getattr(self.model.get_base_model(), "is_quantized", False):
            raise ValueError(
                "Merging into quantized weights would change the scores. Load the adapter without "
                "`quantization_config` to merge it."
            )
        self.model = self.model.merge_and_unload().eval()
        self.save_pretrained(folder)


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """
    Yields the items, making each in a thread while the one before is in use; at most one is waiting. Close it to end early: it
    then waits for the item in progress and makes no more.
    """
    end: Any = object()
    coming = _Ahead(lambda: next(items, end))
    try:
        while (item := coming.result()) is not end:
            coming = _Ahead(lambda: next(items, end))
            yield item
    finally:
        coming.join()


class _Ahead(threading.Thread, Generic[T]):
    """A thread that makes an item, and ends before the item is used. A daemon: it may wait for a request."""

    def __init__(self, make: Callable[[], T]):
        super().__init__(name="ahead", daemon=True)
        self._make, self._future = make, Future[T]()
        self.start()

    def run(self) -> None:
        try:
            self._future.set_result(self._make())
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> T:
        self.join()
        return self._future.result()


def _image_size(row: int, image: Any) -> tuple[int, int]:
    try:
        opened = open_image(image)
    except ValueError as error:
        raise ValueError(f"images[{row}] {error}.") from error
    size = opened.size
    if opened is not image:
        opened.close()
    return size


def _decode(row: int, image: Any) -> Any:
    try:
        return load_image(image)
    except ValueError as error:
        raise ValueError(f"images[{row}] {error}.") from error
