"""Depth estimation with models of transformers."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, DepthAnythingConfig, DPTConfig

from .detection import load_with_processor


# Other models do not record whether larger values are nearer, or pad their input.
DEPTH_CONFIGS = (DepthAnythingConfig, DPTConfig)
_NEAREST = 0.1  # meters; without a lower limit, one pixel close to 0 would flatten the rest of the map


class DepthEstimator:
    """
    Estimates depth with a model of transformers: Depth Anything (1 and 2, relative or metric) or DPT.

    As in T2I-CompBench, each image's values are stretched from 0 (farthest) to 255 (nearest). Relative models estimate
    1 / distance; the distances of metric ones are clipped to at least 0.1 meters and inverted. Weights and errors are
    as for [`~judges.detection.TransformersDetector`].

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
            what="a depth estimator, such as Depth Anything or DPT",
            dtype=torch.float32,
            device=device,
        )
        # DPT's configuration does not have this field
        self._is_metric = getattr(self.model.config, "depth_estimation_type", "relative") == "metric"

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> np.ndarray:
        """
        Estimates the depth of each pixel of an RGB image: float32 of shape `(height, width)`, from 0 to 255 (nearest),
        or all 0 if the depth is constant.
        """
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        if self._is_metric:  # invert before resizing, whose interpolation may overshoot zero
            outputs.predicted_depth = 1 / outputs.predicted_depth.clamp(min=_NEAREST)
        (result,) = self.processor.post_process_depth_estimation(outputs, target_sizes=[(image.height, image.width)])
        return stretch(result["predicted_depth"].float().cpu().numpy())


def stretch(values: np.ndarray) -> np.ndarray:
    """Rescales values of any shape to the range from 0 to 255; all 0 if they are equal."""
    low, high = float(values.min()), float(values.max())
    return np.zeros_like(values) if low == high else (values - low) / (high - low) * 255
