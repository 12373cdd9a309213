"""How near everything in an image is, by models that estimate depth."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, DepthAnythingConfig, DPTConfig

from .detection import load_with_processor


# Others say in no configuration whether near is large, or see a padded image.
DEPTH_CONFIGS = (DepthAnythingConfig, DPTConfig)
_NEAREST = 0.1  # meters; without a limit, one pixel next to 0 would leave no difference to the others


class DepthEstimator:
    """
    Estimates depth with a model of transformers: Depth Anything (1 and 2, relative or metric) or DPT.

    As in T2I-CompBench, each image's values are stretched from 0, what is farthest, to 255, what is nearest. Relative models
    estimate 1 / distance; the distances of metric ones, from 0.1 meters on, are turned into it. Weights and errors are as for
    [`~judges.detection.TransformersDetector`].

    Args:
        name (`str`):
            The model: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such model, it is of another kind, weights are missing, or the repository holds pickles or
            code.
        `OSError`: If the folder holds no model in safetensors.
    """

    def __init__(self, name: str, *, device: Any = None):
        self.name = name
        self.model, self.processor = load_with_processor(
            name,
            AutoModelForDepthEstimation,
            AutoImageProcessor,
            DEPTH_CONFIGS,
            what="an estimator of depth, such as Depth Anything or DPT",
            dtype=torch.float32,
            device=device,
        )
        # a DPT's configuration does not have it
        self._is_metric = getattr(self.model.config, "depth_estimation_type", "relative") == "metric"

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> np.ndarray:
        """Depth of each pixel of an RGB image: float32 of shape `(height, width)`, 0 to 255, near is large; 0 if all is equal."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        if self._is_metric:  # before the map is resized, which may pass zero
            outputs.predicted_depth = 1 / outputs.predicted_depth.clamp(min=_NEAREST)
        (result,) = self.processor.post_process_depth_estimation(outputs, target_sizes=[(image.height, image.width)])
        return stretch(result["predicted_depth"].float().cpu().numpy())


def stretch(values: np.ndarray) -> np.ndarray:
    """Values of any shape from their least to their largest as 0 to 255; 0 if all are equal."""
    low, high = float(values.min()), float(values.max())
    return np.zeros_like(values) if low == high else (values - low) / (high - low) * 255
