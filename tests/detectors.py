"""A tiny detector of a real class, for tests of what needs one."""

import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor


LABELS = {0: "person", 1: "dog", 2: "tvmonitor", 3: "N/A"}


def label_options():
    return {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}


def build_yolos(labels_shown=(0, 1)):
    """A YOLOS of random weights whose last layer is biased to find some classes."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 64], patch_size=16,
        num_detection_tokens=20, use_mid_position_embeddings=False, initializer_range=0.3, **label_options(),
    )  # fmt: skip
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        model.vit.embeddings.detection_tokens.normal_()  # else all find the same
        last = model.class_labels_classifier.layers[-1]
        last.bias.fill_(-30.0)
        last.bias[list(labels_shown) or -1] = 0.0  # the last one is "no object"
    return model


def save_yolos(folder, **options):
    build_yolos(**options).save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
