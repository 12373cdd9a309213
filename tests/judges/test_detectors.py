"""Detectors by their names: segmentation, open vocabulary, the flat world's, functions of the user."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, AutoProcessor
from transformers import AutoModelForZeroShotObjectDetection as ZeroShot

from tests.judge_models import save_depth_anything, save_grounding_dino, save_mask2former, save_owlv2
from trl_spatial.hub.safety import UnsafeRepositoryError
from trl_spatial.judges.detection import TransformersDetector
from trl_spatial.judges.flat import FlatColors, FlatDetector
from trl_spatial.judges.geneval import Detection
from trl_spatial.judges.instances import SegmentationDetector
from trl_spatial.judges.loading import load_colors, load_detector
from trl_spatial.judges.open_vocabulary import OpenVocabularyDetector
from trl_spatial.judges.pictures import crop_object
from trl_spatial.scenes import COLORS, Entity, SceneGraph, place_together, render_layout, sample_graph, sample_style


CLASSES = ["red circle", "Blue Square", "dog"]
SPANS = [[1, 2], [4, 5], [7]]  # [CLS] red circle . blue square . dog . [SEP]


def picture(width=96, height=70):
    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    return save_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory):
    return save_grounding_dino(tmp_path_factory.mktemp("grounding_dino"))


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    return save_owlv2(tmp_path_factory.mktemp("owlv2"))


def rows(detections, digits=3):
    return sorted(
        (found.label, *(round(value, digits) for value in (found.score, *found.box))) for found in detections
    )


def plant(model, **outputs):
    """Replaces outputs of a model, which then runs as before."""
    return model.register_forward_hook(lambda module, inputs, result: type(result)(**(dict(result) | outputs)))


def test_segments_are_the_librarys(mask2former):
    """Oracle: the library's own instances; it compares masks at 384 pixels, so that is the size of the picture."""
    image = picture(384, 384)
    detector = load_detector(str(mask2former), "cpu", threshold=0.05)
    assert isinstance(detector, SegmentationDetector) and not detector.takes_classes
    assert detector.labels == ["dog", "person", "tv"]
    model, processor = (
        AutoModelForUniversalSegmentation.from_pretrained(mask2former),
        AutoImageProcessor.from_pretrained(mask2former),
    )
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (result,) = processor.post_process_instance_segmentation(
        outputs, threshold=0.05, target_sizes=[(384, 384)], return_binary_maps=True
    )
    names = {0: "person", 1: "dog", 2: "tv"}
    expected = []
    for mask, segment in zip(result["segmentation"].numpy(), result["segments_info"], strict=True):
        if segment["label_id"] in names:
            y, x = np.nonzero(mask)
            box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            expected.append(Detection(names[segment["label_id"]], segment["score"], tuple(map(float, box)), mask == 1))
    (found,) = detector([image], [["dog"]])
    assert rows(found) == rows(expected) and len({row[2:] for row in rows(found)}) > 2
    by_score = {round(each.score, 4): each.mask for each in expected}
    assert all((each.mask == by_score[round(each.score, 4)]).all() for each in found)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


def test_segments_of_many_sizes_are_those_of_each_alone(mask2former):
    detector = SegmentationDetector(str(mask2former), 0.05, device="cpu", batch_size=2)
    images = [
        picture(),
        picture(64, 64),
        picture(96, 70).transpose(Image.Transpose.ROTATE_180),
        picture(),
        picture(40, 90),
    ]
    for image, found in zip(images, detector(images), strict=True):
        assert found and rows(found) == rows(detector([image])[0])
        assert all(each.mask.shape == (image.height, image.width) and each.mask.dtype == bool for each in found)


def test_a_planted_mask_gives_its_box_and_score(mask2former):
    """Closed form: class .8, mask logit 3 inside a quarter of the picture, so .8 · sigmoid(3)."""
    detector = SegmentationDetector(str(mask2former), 0.3, device="cpu")
    classes = torch.full((1, 8, 5), -30.0)
    classes[..., -1] = 0.0  # nothing
    classes[0, 2] = torch.tensor([0.1, 0.8, 1e-9, 1e-9, 0.1]).log()
    classes[0, 5] = torch.tensor([1e-9, 1e-9, 1e-9, 0.9, 0.1]).log()  # N/A
    masks = torch.full((1, 8, 16, 16), -3.0)
    masks[0, :, 4:12, 0:8] = 3.0
    with plant(detector.model, class_queries_logits=classes, masks_queries_logits=masks):
        (found,) = detector([Image.new("RGB", (16, 16))])
    assert [(each.label, each.box) for each in found] == [("dog", (0.0, 4.0, 8.0, 12.0))]
    assert found[0].score == pytest.approx(0.8 / (1 + np.exp(-3)), abs=1e-5)
    assert found[0].mask.sum() == 64 and found[0].mask[4:12, :8].all()


def test_grounded_boxes_have_the_class_whose_tokens_they_are(grounding_dino):
    """Oracle: the model by hand, and the library's boxes and scores, whose labels may be no class at all."""
    image = picture()
    detector = load_detector(str(grounding_dino), "cpu", threshold=0.25)
    assert isinstance(detector, OpenVocabularyDetector) and detector.takes_classes
    model, processor = ZeroShot.from_pretrained(grounding_dino), AutoProcessor.from_pretrained(grounding_dino)
    inputs = processor(images=image, text=[CLASSES], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    chances = outputs.logits[0].sigmoid()
    expected = {}
    for chance in chances:
        means = [float(chance[span].mean()) for span in SPANS]
        score = max(float(chance[span].max()) for span in SPANS)
        expected[round(score, 4)] = CLASSES[int(np.argmax(means))]
    (found,) = detector([image], [CLASSES])
    assert {each.label for each in found} == set(CLASSES)
    assert all(expected[round(each.score, 4)] == each.label for each in found)
    outputs.logits[:, :, [0, 3, 6, 8, 9]] = -torch.inf  # what is no class: [CLS], full stops, [SEP]
    (library,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.25, text_threshold=0.1, target_sizes=[(image.height, image.width)]
    )
    assert any(label not in ("red circle", "blue square", "dog") for label in library["text_labels"])
    for box in library["boxes"]:
        box.clamp_(torch.zeros(4), torch.tensor([96.0, 70.0, 96.0, 70.0]))
    scores, boxes = library["scores"].tolist(), library["boxes"].tolist()
    assert rows(Detection("", each.score, each.box) for each in found) == rows(
        map(Detection, [""] * 99, scores, boxes)
    )


def test_words_that_classes_share_decide_nothing(grounding_dino):
    """`circle` is the best token of the red one, but the blue one has it too, and its color."""
    detector = OpenVocabularyDetector(str(grounding_dino), 0.3, device="cpu")
    chances = torch.full((1, 12, 64), 1e-6)
    chances[0, 4, [1, 2, 4, 5]] = torch.tensor([0.2, 0.6, 0.5, 0.58])  # red circle . blue circle .
    chances[0, 7, [3, 6]] = 0.9  # the full stops
    boxes = torch.full((1, 12, 4), 0.5)
    boxes[0, 4] = torch.tensor([0.25, 0.5, 0.5, 0.5])
    with plant(detector.model, logits=chances.logit(), pred_boxes=boxes):
        found, nothing = detector([picture(80, 40)] * 2, [["red circle", "blue circle"], []])
    assert nothing == []
    assert rows(found) == [("blue circle", 0.6, 0.0, 10.0, 40.0, 30.0)]


def test_boxes_of_owl_are_the_librarys(owlv2):
    """Oracle: the library's labels of the texts, with boxes cut at the picture, which the model sees padded."""
    image = picture()
    detector = load_detector(str(owlv2), "cpu", threshold=0.2)
    model, processor = ZeroShot.from_pretrained(owlv2), AutoProcessor.from_pretrained(owlv2)
    texts = [f"a photo of a {name}" for name in CLASSES]
    with torch.no_grad():
        outputs = model(**processor(text=[texts], images=image, return_tensors="pt"))
    (library,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.2, target_sizes=[(70, 96)], text_labels=[CLASSES]
    )
    expected = [
        Detection(
            name, score, tuple(min(max(value, 0), limit) for value, limit in zip(box, (96, 70, 96, 70), strict=True))
        )
        for name, score, box in zip(
            library["text_labels"], library["scores"].tolist(), library["boxes"].tolist(), strict=True
        )
    ]
    (found,) = detector([image], [CLASSES])
    assert found and rows(found) == rows(expected)


@pytest.mark.parametrize("fixture", ["grounding_dino", "owlv2"])
def test_each_image_has_classes_of_its_own(fixture, request):
    detector = OpenVocabularyDetector(str(request.getfixturevalue(fixture)), 0.1, device="cpu")
    images, classes = [picture(), picture(50, 90), picture()], [["dog"], CLASSES, ["tv remote", "dog", "dog"]]
    for image, names, found in zip(images, classes, detector(images, classes), strict=True):
        assert rows(found) == rows(detector([image], [names])[0]) and {each.label for each in found} <= set(names)
    for wrong in (None, [["dog"]]):
        with pytest.raises(ValueError, match=r"must be told what to look for: .* each of the 3 images"):
            detector(images, wrong)
    with pytest.raises(ValueError, match="tokens at most"):
        detector(images[:1], [["red circle " * 40]])


def test_a_class_without_words_is_refused(grounding_dino):
    with pytest.raises(ValueError, match="cannot look for the class ''"):
        OpenVocabularyDetector(str(grounding_dino), device="cpu")([picture()], [["dog", "."]])


def test_what_is_no_detector_is_refused(tmp_path, mask2former, detector_folder):
    assert isinstance(load_detector(str(detector_folder), "cpu"), TransformersDetector)
    for spec in ("nowhere", "./a/b", "flat:"):
        with pytest.raises(ValueError, match=rf"There is no detector '{spec}'. Name flat, .*module:function"):
            load_detector(spec)
    depth = save_depth_anything(tmp_path / "depth")
    with pytest.raises(ValueError, match="is a depth_anything model, not an object detector"):
        load_detector(str(depth))
    with pytest.raises(ValueError, match="is a mask2former model, not an open-vocabulary detector"):
        OpenVocabularyDetector(str(mask2former))
    pickled = tmp_path / "pickled"
    shutil.copytree(mask2former, pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UnsafeRepositoryError, match=r"it holds pytorch_model.bin"):
        load_detector(str(pickled))


MODULE = """
from trl_spatial.judges.geneval import Detection

def everything(images):
    return [[Detection("dog", 0.5, (0, 0, *image.size))] for image in images]

class Asked:
    takes_classes = True
    def __call__(self, images, classes):
        return [[Detection(name, 0.5, (0, 0, 1, 1)) for name in names] for names in classes]

def wrong(images):
    return [["dog"]]

number = 3
"""


def test_a_function_as_detector(tmp_path, monkeypatch):
    (tmp_path / "my_detectors.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    images = [Image.new("RGB", (20, 10))] * 2
    detector = load_detector("my_detectors:everything")
    assert detector.name == "my_detectors:everything" and not detector.takes_classes
    assert detector(images, [["cat"], []]) == [[Detection("dog", 0.5, (0, 0, 20, 10))]] * 2
    detector = load_detector("my_detectors:Asked")
    assert [[each.label for each in found] for found in detector(images, [["cat"], []])] == [["cat"], []]
    with pytest.raises(TypeError, match=r"list of `trl_spatial.rewards.Detection` for each image"):
        load_detector("my_detectors:wrong")(images)
    with pytest.raises(ValueError, match=r"The detector my_detectors:number is not a function: .* Asked, wrong"):
        load_detector("my_detectors:number")
    with pytest.raises(ValueError, match=r"no module 'no_such_module' .* Name flat"):
        load_detector("no_such_module:f")


def draw(seed, image_size, relations=None):
    """A scene, drawn, and where the renderer has put everything."""
    rng = np.random.default_rng(seed)
    kinds = {} if relations is None else {"relations": relations}
    graph = sample_graph(rng, num_objects=3, num_relations=1 if relations else 2, **kinds)
    style = sample_style(graph.entities, rng)
    (layout,) = place_together([graph], rng)
    return graph, layout, render_layout(layout, style, image_size)


@pytest.mark.parametrize("image_size", [64, 200])
def test_the_flat_detector_finds_what_the_renderer_has_drawn(image_size):
    detector, colors = load_detector("flat"), load_colors("flat")
    for seed in range(60):
        overlapping = ("front_of", "behind", "inside", "contains") if seed % 2 else None
        _, layout, image = draw(seed, image_size, overlapping)
        (found,) = detector([image])
        assert sorted(each.label for each in found) == sorted(placed.entity.look for placed in layout)
        by_label = {each.label: each for each in found}
        for placed in layout:
            each = by_label[placed.entity.look]
            x, y, radius = (image_size * value for value in (placed.x, placed.y, placed.radius))
            assert each.box == pytest.approx((x - radius, y - radius, x + radius, y + radius), abs=0.05 * image_size)
            assert each.score == 1.0 and each.mask.shape == (image_size, image_size)
            assert colors(crop_object(image, each), placed.entity.shape) == placed.entity.color


def test_flat_boxes_are_exact_where_nothing_is_hidden():
    errors = []
    for seed in range(30):
        _, layout, image = draw(seed, 128, ("left_of", "above"))
        by_label = {each.label: each for each in FlatDetector()([image])[0]}
        for placed in layout:
            edges = (
                placed.x - placed.radius,
                placed.y - placed.radius,
                placed.x + placed.radius,
                placed.y + placed.radius,
            )
            errors.append(np.abs(np.array(by_label[placed.entity.look].box) - 128 * np.array(edges)).max())
    assert max(errors) < 1.0  # pixels


def test_flat_boxes_of_pictures_that_are_not_square():
    """A strip of the background beside or above a picture moves its boxes."""
    _, _, image = draw(3, 128)
    (found,) = FlatDetector()([image])
    for shift in ((40, 0), (0, 40)):
        wide = Image.new("RGB", (128 + shift[0], 128 + shift[1]), image.getpixel((0, 0)))
        wide.paste(image, shift)
        (moved,) = FlatDetector()([wide])
        expected = {each.label: np.array(each.box) + np.array(shift * 2) for each in found}
        assert all(np.abs(np.array(each.box) - expected[each.label]).max() < 2 for each in moved)
        assert len(moved) == len(expected)


def test_flat_classes_may_leave_out_colors():
    red, blue = Entity("red", "circle"), Entity("blue", "circle", "small")
    rng = np.random.default_rng(0)
    graph = SceneGraph((red, blue, Entity("red", "square")))
    style = sample_style(graph.entities, rng)
    (layout,) = place_together([graph], rng)
    image = render_layout(layout, style, 128)
    asked = ["circle", "Red Circles", "small blue circle", "green circle", "red", "dog", "red blue circle", ""]
    (found,) = FlatDetector()([image], [asked])
    assert sorted(each.label for each in found) == ["Red Circles", "circle", "circle", "small blue circle"]
    assert FlatDetector()([Image.new("RGB", (64, 64), "grey")], [asked]) == [[]]


def test_flat_colors_are_read_within_the_shape():
    """Every color fills a diamond in a crop whose corners, half of it, have another."""
    y, x = np.mgrid[-1:1:41j, -1:1:41j]
    inside = (np.abs(x) + np.abs(y) < 0.98)[..., None]
    for index, (name, color) in enumerate(COLORS.items()):
        other = list(COLORS.values())[(index + 3) % len(COLORS)]
        crop = Image.fromarray(np.where(inside, color, other).astype(np.uint8))
        assert FlatColors()(crop, f"{name} diamond") == name
        assert FlatColors()(Image.new("RGB", (1, 1), color), "thing") == name
    assert FlatColors()(Image.new("RGB", (9, 9), "grey"), "circle") == "none"


def test_a_crop_shows_nothing_but_the_object():
    """GenEval paints the rest grey, #999."""
    image = Image.new("RGB", (10, 8), "red")
    mask = np.zeros((8, 10), dtype=bool)
    mask[2:4, 3:6] = True
    crop = np.asarray(crop_object(image, Detection("dog", 0.5, (2.0, 2.0, 7.0, 5.0), mask)))
    assert crop.shape == (3, 5, 3)
    assert (crop[:2, 1:4] == (255, 0, 0)).all() and (crop == 0x99).all(axis=2).sum() == 15 - 6
    whole = crop_object(image, Detection("dog", 0.5, (2.0, 2.0, 7.0, 5.0)))
    assert whole.getcolors() == [(15, (255, 0, 0))]
