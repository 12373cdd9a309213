"""Detectors and color classifiers of transformers: tiny models of the real classes, saved and loaded as users do."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from models import build_tokenizer
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    YolosModel,
)

from tests.detectors import build_yolos, label_options, save_yolos
from trl_spatial.hub.safety import UnsafeRepositoryError
from trl_spatial.judges.detection import COLOR_TEMPLATES, TransformersDetector, ZeroShotColors
from trl_spatial.judges.geneval import COLORS
from trl_spatial.rewards import GenEvalReward, SilentDetectorError, load_reward


RESNET = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")


def save_rt_detr(folder):
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16,
        num_queries=8, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2,
        num_denoising=0, decoder_n_points=2, encoder_layers=1, **label_options(),
    )  # fmt: skip
    model = RTDetrForObjectDetection(config)
    with torch.no_grad():  # a new one starts from a probability of 0.01
        model.model.decoder.class_embed[0].bias.zero_()
    model.save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def save_conditional_detr(folder):
    config = ConditionalDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=ResNetConfig(**RESNET, out_features=["stage4"]), d_model=16, num_queries=8, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        **label_options(),
    )  # fmt: skip
    ConditionalDetrForObjectDetection(config).save_pretrained(folder)
    ConditionalDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)


@pytest.fixture(scope="module", params=["yolos", "rt_detr", "conditional_detr"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    {"yolos": save_yolos, "rt_detr": save_rt_detr, "conditional_detr": save_conditional_detr}[request.param](folder)
    return folder


def save_classifier(folder, family):
    """A tiny CLIP or SigLIP with a tokenizer whose words are whole."""
    texts = [template.format(color=color, name="dog") for color in COLORS for template in COLOR_TEMPLATES]
    tokenizer = build_tokenizer(texts, 1000)
    end = ("<|im_end|>", tokenizer.eos_token_id)  # whose state CLIP takes for the text's
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[end])
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(
        vocab_size=len(tokenizer), max_position_embeddings=20, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    vision = sizes | dict(image_size=32, patch_size=8)
    torch.manual_seed(0)
    if family == "clip":
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=20.0)
        model = CLIPModel(config)
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("clip"), "clip")


def as_tuples(detections):
    return [(found.label, found.score, *found.box) for found in detections]


def test_detections_are_the_models_own(folder, images):
    """Oracle: the model and its image processor by hand, an image at a time."""
    detector = TransformersDetector(str(folder), threshold=0.2, device="cpu", batch_size=2)
    assert detector.labels == ["dog", "person", "tv"]
    model, processor = AutoModelForObjectDetection.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    names = {0: "person", 1: "dog", 2: "tv"}
    mixed = [*images, images[0].transpose(Image.Transpose.FLIP_TOP_BOTTOM), images[1], images[0]]
    results = detector(mixed)
    assert len(results) == len(mixed) and sum(map(len, results)) > len(mixed)
    for image, detections in zip(mixed, results, strict=True):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        (raw,) = processor.post_process_object_detection(
            outputs, threshold=0.2, target_sizes=[(image.height, image.width)]
        )
        expected = [
            (names[label], score, *box)
            for label, score, box in zip(*(raw[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
            if label in names
        ]
        assert len(detections) == len(expected)
        for found, wanted in zip(sorted(as_tuples(detections)), sorted(expected), strict=True):
            assert found[0] == wanted[0]
            assert found[1:] == pytest.approx(wanted[1:], abs=1e-3)
        assert all(found.score > 0.2 for found in detections)
    assert results[0] != results[5]  # they depend on the image


def test_boxes_are_in_pixels_of_the_image(detector_folder):
    """A larger copy of an image, which the model sees at the same size, has larger boxes."""
    detector = TransformersDetector(str(detector_folder), device="cpu")
    small = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    large = small.resize((128, 64), Image.Resampling.NEAREST)
    seen_small, seen_large = (detector([image])[0] for image in (small, large.resize((64, 64), Image.Resampling.BOX)))
    assert as_tuples(seen_small) == as_tuples(seen_large)
    model_size = {"height": 64, "width": 64}
    assert detector.processor.size == model_size
    left, top, right, bottom = (
        sum(found.box[i] for found in detector([large])[0]) / sum(found.box[i] for found in seen_small)
        for i in range(4)
    )
    assert (left, right) == pytest.approx((2, 2), rel=0.1) and (top, bottom) == pytest.approx((1, 1), rel=0.1)


def test_the_reward_by_its_name(detector_folder, clip_folder, monkeypatch, images):
    row = [{"class": "dog", "count": 1}]
    reward = load_reward(f"geneval:{detector_folder}", device="cpu")
    assert isinstance(reward, GenEvalReward) and reward.kind == "partial" and reward.color_classifier is None
    assert reward(["x"] * 5, images, include=[row] * 5) == [1.0] * 5
    monkeypatch.chdir(detector_folder.parent)  # a folder without a slash is no function
    reward = load_reward(f"geneval-strict:{detector_folder.name},{clip_folder}", device="cpu")
    assert reward.kind == "strict" and isinstance(reward.color_classifier, ZeroShotColors)
    row = [{"class": "dog", "count": 1, "color": color} for color in COLORS]
    assert reward.judge(["x"], images[:1], include=[row])[0].reason
    shutil.copytree(detector_folder, "yolos,tiny", dirs_exist_ok=True)
    try:
        assert load_reward("geneval:yolos,tiny", device="cpu").color_classifier is None
    finally:
        shutil.rmtree("yolos,tiny")


@pytest.mark.parametrize(
    "name", ["geneval:", "geneval:nowhere", "geneval-strict:./x/y", "geneval:{},", "geneval:{},nowhere"]
)
def test_a_wrong_name_says_how_to_write_it(name, detector_folder):
    with pytest.raises(ValueError, match=r"no reward .* is no model. Write geneval:DETECTOR or .*a module of yours"):
        load_reward(name.format(detector_folder))


def test_a_detector_of_nothing_fails_when_the_reward_is_made(tmp_path):
    save_yolos(tmp_path, labels_shown=())
    detector = TransformersDetector(str(tmp_path), device="cpu")
    assert detector([Image.new("RGB", (20, 20))]) == [[]]
    with pytest.raises(
        SilentDetectorError, match=r"does not find the person .*: it found nothing above a score of 0.3"
    ):
        load_reward(f"geneval:{tmp_path}", device="cpu")


def test_what_is_no_detector_is_refused(tmp_path, clip_folder, detector_folder):
    with pytest.raises(ValueError, match="is a clip model, not an object detector"):
        TransformersDetector(str(clip_folder))
    with pytest.raises(ValueError, match="is a yolos model, not a model of zero-shot image classification"):
        ZeroShotColors(str(detector_folder))
    # a backbone, to which transformers would add a random head
    backbone = tmp_path / "backbone"
    YolosModel(build_yolos().config).save_pretrained(backbone)
    shutil.copy(detector_folder / "preprocessor_config.json", backbone)
    with pytest.raises(ValueError, match=r"lacks 12 weights .*bbox_predictor.*random"):
        TransformersDetector(str(backbone))
    pickled = tmp_path / "pickled"
    shutil.copytree(detector_folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(build_yolos().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UnsafeRepositoryError, match=r"pickled is refused: it holds pytorch_model.bin"):
        TransformersDetector(str(pickled))
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="safetensors"):
        TransformersDetector(str(pickled))


def test_a_detector_on_the_hub_with_a_revision(tmp_path, monkeypatch, detector_folder):
    """Oracle: two commits in the Hub's cache, of which one finds nothing."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--ORG--yolos"
    for branch, commit, shown in (("main", "1" * 40, (0, 1)), ("v2", "2" * 40, ())):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        save_yolos(repository / "snapshots" / commit, labels_shown=shown)
    image = Image.new("RGB", (20, 20))
    assert TransformersDetector("ORG/yolos", device="cpu")([image])[0]
    assert TransformersDetector("ORG/yolos@v2", device="cpu")([image]) == [[]]


@pytest.mark.parametrize(
    ("family", "padding"), [("clip", {}), ("siglip", {"padding": "max_length", "max_length": 20})]
)
def test_colors_are_the_classifiers_own(family, padding, tmp_path):
    """Oracle: the score of every text by itself; SigLIP was trained on texts padded to its length."""
    colors = ZeroShotColors(str(save_classifier(tmp_path, family)), device="cpu")
    chosen = set()
    for shade in ("red", "blue", "white", "black"):
        crop = Image.new("RGB", (40, 28), shade)
        scores = {}
        for color in COLORS:
            texts = [template.format(color=color, name="dog") for template in COLOR_TEMPLATES]
            inputs = [colors.processor(text=[text], images=[crop], return_tensors="pt", **padding) for text in texts]
            with torch.no_grad():
                scores[color] = sum(colors.model(**each).logits_per_image.item() for each in inputs)
        assert colors(crop, "dog") == max(scores, key=scores.__getitem__)
        chosen.add(colors(crop, "dog"))
        assert len({round(score, 6) for score in scores.values()}) == len(COLORS)
    assert len(chosen) > 1 or family == "siglip"
