"""GenEval's rules: the formula written out again, hand-computed boxes, properties, and scenes of which everything is known."""

import importlib
import json
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trl_spatial.judges.geneval import COLORS, MAX_OBJECTS, geneval_name
from trl_spatial.rewards import (
    Detection,
    GenEvalReward,
    SilentDetectorError,
    judge,
    read_specification,
    relative_positions,
)
from trl_spatial.scenes import Entity, PlacedObject, locate_objects, render_layout, sample_style
from trl_spatial.scripts.datasets import load_prompts


PUBLIC_FILE = Path(__file__).parents[3] / "shared" / "bench_data" / "geneval" / "evaluation_metadata.jsonl"
MIRRORED = {"left of": "right of", "right of": "left of"}
OPPOSITE = MIRRORED | {"above": "below", "below": "above"}
# COCO's classes as DETR, torchvision and YOLO call them.
COCO = [
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
]


def box_around(x, y, width, height):
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def random_boxes(number, seed=0):
    rng = np.random.default_rng(seed)
    centers, sizes = rng.uniform(0, 100, (number, 2)), rng.uniform(1, 60, (number, 2))
    return [tuple(row) for row in np.hstack([centers - sizes / 2, centers + sizes / 2]).tolist()]


def found(label, *box, score=0.95):
    return Detection(label, score, box or (0, 0, 10, 10))


def specification(*include, exclude=(), tag=None):
    return read_specification({"include": list(include), "exclude": list(exclude), "tag": tag})


def sees(*detections):
    """A detector that finds the same in every picture, and what the self-test shows."""
    return lambda images: [[found("person", score=0.5), *detections] for _ in images]


# ---------------------------------------------------------------------------------------------- positions


def written_out(box, target):
    """The formula of the documentation, line by line."""
    a, b = np.reshape(box, (2, 2)), np.reshape(target, (2, 2))
    o = a.mean(0) - b.mean(0)
    size_a, size_b = a[1] - a[0], b[1] - b[0]
    rest = np.maximum(np.abs(o) - 0.1 * (size_a + size_b), 0) * np.sign(o)
    norm = np.linalg.norm(o)
    dx, dy = rest / norm if norm else (0.0, 0.0)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        ((-50, 0), 20, {"left of"}),
        ((50, 0), 20, {"right of"}),
        ((0, -50), 20, {"above"}),
        ((0, 50), 20, {"below"}),
        ((0, 0), 20, set()),
        # margin 0.1 · (20 + 20) = 4: of an offset of 8, 4 are left, half of it and not more
        ((-8, 0), 20, set()),
        ((-8.01, 0), 20, {"left of"}),
        ((-4, 0), 20, set()),
        # without sizes: 60° from the axis is exactly half, 45° is both
        ((np.cos(np.radians(59)), np.sin(np.radians(59))), 0, {"right of", "below"}),
        ((np.cos(np.radians(61)), np.sin(np.radians(61))), 0, {"below"}),
        ((-1, -1), 0, {"left of", "above"}),
    ],
)
def test_positions_computed_by_hand(offset, size, expected):
    assert relative_positions(box_around(*offset, size, size), box_around(0, 0, size, size)) == expected


def test_positions_are_the_written_out_formula():
    boxes = random_boxes(4000)
    pairs = list(zip(boxes[::2], boxes[1::2], strict=True))
    results = [relative_positions(*pair) for pair in pairs]
    assert results == [written_out(*pair) for pair in pairs]
    counts = {relation: sum(relation in result for result in results) for relation in OPPOSITE}
    assert min(counts.values()) > 200 and sum(not result for result in results) > 100


def test_positions_mirror_turn_around_and_keep_under_scale_and_shift():
    boxes = random_boxes(600, seed=1)
    for box, target in zip(boxes[::2], boxes[1::2], strict=True):
        relations = relative_positions(box, target)
        assert not any(OPPOSITE[relation] in relations for relation in relations)
        assert relative_positions(target, box) == {OPPOSITE[relation] for relation in relations}
        mirror = [(100 - right, top, 100 - left, bottom) for left, top, right, bottom in (box, target)]
        assert relative_positions(*mirror) == {MIRRORED.get(relation, relation) for relation in relations}
        moved = [
            tuple(3 * value + shift for value, shift in zip(b, (7, -9, 7, -9), strict=True)) for b in (box, target)
        ]
        assert relative_positions(*moved) == relations


# ---------------------------------------------------------------------------------------------- verdicts


def test_an_object_counts_above_the_threshold_and_counting_is_stricter():
    one = {"class": "dog", "count": 1}
    for tag, score, expected in (
        ("single_object", 0.30, False), ("single_object", 0.31, True), (None, 0.31, True),
        ("counting", 0.90, False), ("counting", 0.91, True),
    ):  # fmt: skip
        assert judge(specification(one, tag=tag), [found("dog", score=score)]).correct is expected
    result = judge(specification(one), [found("cat")])
    assert (result.correct, result.strict, result.partial) == (False, 0.0, 0.0)
    assert result.reason == "expected dog>=1, found 0"
    assert judge(specification(one), [found("dog")] * 3).correct  # more are no mistake unless excluded
    assert judge(specification(one), [found("dog")], threshold=0.96).correct is False


@pytest.mark.parametrize("number", range(7))
def test_counting_wants_the_number(number):
    spec = specification({"class": "dog", "count": 2}, exclude=[{"class": "dog", "count": 3}], tag="counting")
    result = judge(spec, [found("dog")] * number)
    assert result.correct is (number == 2)
    assert result.partial == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.0][number]


def test_at_most_sixteen_of_a_class_and_the_most_confident():
    assert judge(specification({"class": "dog", "count": MAX_OBJECTS}), [found("dog")] * 40).correct
    spec = specification({"class": "dog"}, exclude=[{"class": "dog", "count": MAX_OBJECTS}])
    assert judge(spec, [found("dog")] * 40).reason == "expected dog<16, found 16"
    # the twentieth is the only one at the right, and the most confident
    dogs = [found("dog", i, 0, i + 1, 1, score=0.5) for i in range(20)]
    dogs.append(found("dog", 100, 0, 110, 10, score=0.9))
    spec = specification({"class": "cat"}, {"class": "dog", "position": ["right of", 0]})
    cat = found("cat", 50, 0, 60, 10)
    assert judge(spec, [*dogs, cat]).correct
    assert not judge(spec, [*dogs[:-1], cat]).correct


def test_all_pairs_of_the_most_confident_must_have_the_position():
    spec = specification({"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]})
    cats = [found("cat", x, 0, x + 10, 10) for x in (60, 90)]
    near, far, wrong = (found("dog", x, 0, x + 10, 10, score=score) for x, score in ((0, 0.9), (20, 0.8), (75, 0.7)))
    assert judge(spec, [near, far, wrong, *cats]).correct  # the third dog is not asked
    result = judge(spec, [near, wrong, *cats])
    assert (result.correct, result.partial) == (False, pytest.approx(2 / 3))
    assert result.reason == "expected dog left of target, found right of target"
    concentric = [found("cat", 0, 0, 10, 10), found("dog", 0, 0, 10, 10)]
    one = specification({"class": "cat"}, {"class": "dog", "position": ["above", 0]})
    assert judge(one, concentric).reason == "expected dog above target, found  target"


def test_a_target_that_is_not_as_specified_is_none():
    spec = specification({"class": "cat", "color": "red"}, {"class": "dog", "position": ["left of", 0]})
    boxes = [found("cat", 60, 0, 70, 10), found("dog", 0, 0, 10, 10)]
    assert judge(spec, boxes, lambda detection: "red").partial == 1.0
    result = judge(spec, boxes, lambda detection: "blue")
    assert result.reason == "expected red cat>=1, found 0 red; and 1 blue\nno target for dog to be left of"
    assert result.partial == 0.5  # both are there


def test_colors_of_the_most_confident_objects():
    spec = specification({"class": "cup", "count": 2, "color": "red"})
    cups = [found("cup", i, 0, i + 1, 1, score=1 - i / 10) for i in range(3)]
    for colors, correct, partial in (
        (("red", "red", "blue"), True, 1.0), (("red", "blue", "red"), False, 0.75), (("blue", "green", "red"), False, 0.5),
    ):  # fmt: skip
        result = judge(spec, cups, lambda detection, colors=colors: colors[int(detection.box[0])])
        assert (result.correct, result.partial) == (correct, partial)
    assert judge(spec, cups[:1], lambda detection: "red").partial == 0.25  # half of the number, no color
    with pytest.raises(ValueError, match=r"names colors.*Give a color classifier"):
        judge(spec, cups)


def test_an_excluded_class_alone():
    spec = specification({"class": "dog"}, exclude=[{"class": "cat", "count": 1}])
    assert judge(spec, [found("dog")]).partial == 1.0
    result = judge(spec, [found("dog"), found("cat")])
    assert (result.correct, result.partial, result.reason) == (False, 0.5, "expected cat<1, found 1")


def test_the_share_is_full_exactly_if_the_verdict_is_correct():
    rng = random.Random(0)
    num_correct = 0
    for _ in range(3000):
        names = rng.choices(["cat", "dog"], k=rng.randint(1, 2))
        include = [{"class": name, "count": rng.randint(1, 2)} for name in names]
        if rng.random() < 0.5:
            include[-1]["color"] = rng.choice(["red", "blue"])
        if len(include) == 2 and rng.random() < 0.5:
            include[1]["position"] = [rng.choice(list(OPPOSITE)), 0]
        exclude = [{"class": "cat", "count": 3}] if rng.random() < 0.5 else []
        boxes = random_boxes(rng.randint(1, 5), seed=rng.randrange(2**32))
        detections = [found(rng.choice(["cat", "dog"]), *box, score=rng.random()) for box in boxes]
        spec = specification(*include, exclude=exclude, tag=rng.choice([None, "counting"]))
        result = judge(spec, detections, lambda detection: ("red", "blue")[int(detection.box[0]) % 2])
        assert 0 <= result.partial <= 1
        assert result.correct is (result.partial == 1) is (result.reason == "") is (result.strict == 1.0)
        num_correct += result.correct
    assert 200 < num_correct < 2800


# ---------------------------------------------------------------------------------------------- specifications


def test_names_of_classes():
    assert geneval_name(" TVmonitor ") == geneval_name("television") == "tv"
    assert geneval_name("Potted_Plant") == geneval_name("pottedplant") == "potted plant"
    assert geneval_name("zebra crossing") == "zebra crossing"
    assert len({geneval_name(name) for name in COCO}) == 80
    names = {geneval_name(name) for name in COCO}
    assert {"computer mouse", "tv remote", "computer keyboard"} <= names
    assert {geneval_name(name) for name in ("motorbike", "aeroplane", "sofa", "diningtable", "cellphone")} <= names


def test_a_row_as_datasets_gives_it():
    filled = {"class": "cup", "count": 1, "color": None, "position": None}
    row = {
        "include": [filled, filled | {"position": ["above", "0"]}],
        "exclude": None,
        "tag": "position",
        "prompt": "x",
    }
    spec = read_specification(row)
    assert spec == read_specification(json.dumps(row))
    assert spec.include[1].position == ("above", 0) and spec.exclude == ()
    assert spec.class_names == ["cup"] and not spec.needs_colors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is not JSON"),
        ("3", "should be a mapping"),
        ({"include": []}, "asks for nothing"),
        ({"include": "cup"}, "should be a list"),
        ({"include": [3]}, r"include\[0\]` is 3"),
        ({"include": [{"count": 1}]}, "names no `class`"),
        ({"include": [{"class": "cup", "count": 0}]}, "from 1 to"),
        ({"include": [{"class": "cup", "count": 1.5}]}, "from 1 to"),
        ({"include": [{"class": "cup", "color": "teal"}]}, "one of red, orange"),
        ({"include": [{"class": "cup", "position": ["left of", 0]}]}, "an entry before this one"),
        ({"include": [{"class": "cup"}, {"class": "cup", "position": ["near", 0]}]}, "one of left of"),
        ({"include": [{"class": "cup"}, {"class": "cup", "position": "left of"}]}, "one of left of"),
    ],
)
def test_bad_specifications_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_specification(row)


@pytest.mark.skipif(not PUBLIC_FILE.is_file(), reason="GenEval's prompts are not there")
def test_the_public_file_is_understood():
    prompts = load_prompts(str(PUBLIC_FILE), "train")
    lines = [json.loads(line) for line in PUBLIC_FILE.read_text().splitlines()]
    assert len(prompts) == 553
    columns = {name: prompts[:][name] for name in ("include", "exclude", "tag")}
    for row, line in zip(prompts, lines, strict=True):
        assert read_specification(row) == read_specification(line)
    detector = sees(found("dog"))
    detector.labels = COCO
    reward = GenEvalReward(detector, lambda crop, name: "red")
    image = Image.new("RGB", (16, 16))
    rewards = reward(prompts["prompt"][:], [image] * 553, **columns)
    assert None not in rewards and 0.0 < np.mean(rewards) < 0.5
    whole = reward([line["prompt"] for line in lines], [image] * 553, metadata=[json.dumps(line) for line in lines])
    assert whole == rewards
    # seen as specified: every row can be satisfied
    for line in lines:
        spec = read_specification(line)
        places = {"left of": (-200, 0), "right of": (200, 0), "above": (0, -200), "below": (0, 200)}
        shown = [
            found(entry.class_name, *box_around(*places.get(entry.position and entry.position[0], (0, 0)), 50, 50))
            for entry in spec.include
            for _ in range(entry.count)
        ]
        colors = {entry.class_name: entry.color for entry in spec.include}
        assert judge(spec, shown, lambda detection, colors=colors: colors[detection.label]).partial == 1.0


# ---------------------------------------------------------------------------------------------- the reward


def find_shapes(images):
    """A perfect detector for rendered scenes: shapes are classes. Photographs show a person."""
    if images[0].size == (256, 300):
        return [[found("person")]]
    detections = []
    for image in images:
        side = image.width
        shapes = [
            (o.shape, *(side * v for v in box_around(o.x, o.y, 2 * o.radius, 2 * o.radius)))
            for o in locate_objects(image)
        ]
        detections.append([found(*shape) for shape in shapes])
    return detections


find_shapes.labels = ["circle", "square", "triangle", "diamond", "person"]


def draw_around(angle, distance=0.5):
    """A red circle at an angle from a blue square, clockwise from the right; the relations that it then has."""
    square = PlacedObject(
        Entity("blue", "square"), 0.5 - np.cos(angle) * distance / 2, 0.5 - np.sin(angle) * distance / 2, 0.1
    )
    circle = PlacedObject(Entity("red", "circle"), 1 - square.x, 1 - square.y, 0.12)
    style = sample_style([square.entity, circle.entity], np.random.default_rng(int(angle * 1000)))
    boxes = [box_around(o.x, o.y, 2 * o.radius, 2 * o.radius) for o in (circle, square)]
    return render_layout([square, circle], style), written_out(*boxes)


@pytest.mark.parametrize("kind", ["partial", "strict"])
def test_scenes_whose_layout_is_known(kind):
    """Oracle: where the renderer was told to draw."""
    angles = np.radians(np.arange(0, 360, 15))
    images, expected = zip(*[draw_around(angle) for angle in angles], strict=True)
    assert list(expected[::6]) == [{"right of"}, {"below"}, {"left of"}, {"above"}]
    assert {"right of", "below"} in expected
    reward = GenEvalReward(find_shapes, kind=kind, batch_size=5)
    for asked in OPPOSITE:
        row = [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": [asked, 0]}]
        wrong = {"partial": pytest.approx(2 / 3), "strict": 0.0}[kind]
        rewards = reward(["x"] * len(images), list(images), include=[row] * len(images))
        assert rewards == [1.0 if asked in relations else wrong for relations in expected]
    assert reward.__name__ == {"partial": "geneval", "strict": "geneval_strict"}[kind]
    absent = [{"class": "triangle", "count": 1}, {"class": "circle", "count": 1, "position": ["above", 0]}]
    assert reward(["x"], [images[0]], include=[absent]) == [{"partial": pytest.approx(1 / 3), "strict": 0.0}[kind]]


def test_colors_are_asked_of_the_crop():
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (20, 0, 40, 20))
    crops = []

    def classify(crop, name):
        crops.append((name, crop.size))
        return "red" if crop.getpixel((0, 0)) == (255, 0, 0) else "white"

    row = [{"class": "cup", "count": 1, "color": "red"}]
    for box, color in (((20.4, -3, 45, 19.6), "red"), ((0, 0, 19, 20), "white"), ((39.9, 5, 39.95, 5.1), "red")):
        result = GenEvalReward(sees(found("Cup", *box)), classify).judge(["x"], [image], include=[row])[0]
        assert result.correct is (color == "red")
    assert crops == [("cup", (20, 20)), ("cup", (19, 20)), ("cup", (1, 1))]
    with pytest.raises(
        ValueError, match=r"The prompt 'a red cup' cannot be judged. Its objects have colors.*classifier"
    ):
        GenEvalReward(sees())(["a red cup"], [image], include=[row])
    assert {"red", "white"} <= set(COLORS)


def test_rows_without_a_specification_have_no_reward_and_cost_no_detection():
    sizes = []

    def detector(images):
        sizes.append(len(images))
        return [[found("dog"), found("person")] for _ in images]

    reward = GenEvalReward(detector, batch_size=2)
    dog, cat = [{"class": "dog", "count": 1}], [{"class": "cat", "count": 1}]
    images = [Image.new("L", (8, 8))] * 6
    assert reward(["x"] * 6, images, include=[dog, None, cat, [], dog, dog], seed=[1] * 6) == [1, None, 0, None, 1, 1]
    assert sizes == [1, 1, 2, 2]  # the two pictures of the self-test, two batches
    rows = [json.dumps({"include": dog}), None, {"include": cat}, "", None, None]
    assert reward(["x"] * 6, images, metadata=rows) == [1, None, 0, None, None, None]
    with pytest.warns(UserWarning, match="gives none of these images a reward"):
        assert reward(["x"], images[:1]) == [None]


def test_an_unknown_class_names_those_like_it():
    detector = sees()
    detector.labels = ["person", "computer keyboard", "dog"]
    reward = GenEvalReward(detector)
    image = Image.new("RGB", (8, 8))
    reward(["x"], [image], include=[[{"class": "keyboard", "count": 1}]])
    with pytest.raises(
        ValueError, match=r"'a kybd' cannot be judged.*class 'computer kyboard' among its 3.*computer keyboard"
    ):
        reward(["a kybd"], [image], include=[[{"class": "computer kyboard", "count": 1}]])
    detector.labels = ["circle", "square"]
    with pytest.raises(
        ValueError, match=r"self-test shows the detector a person.*it knows circle, square.*self_test_label"
    ):
        GenEvalReward(detector)


def test_a_detector_that_finds_nothing_is_found_out():
    with pytest.raises(
        SilentDetectorError, match="does not find the person in the self-test's picture: it found nothing"
    ):
        GenEvalReward(lambda images: [[] for _ in images])
    with pytest.raises(SilentDetectorError, match=r"found dog above a score of 0.3, and a person at 0.250"):
        GenEvalReward(lambda images: [[found("dog"), found("person", score=0.25)]])
    shown = []

    def only_blue(images):
        shown.extend(images)
        return [[found("sea")] if image.getpixel((0, 0)) == (0, 0, 255) else [] for image in images]

    sea = Image.new("RGB", (30, 20), "blue")
    reward = GenEvalReward(only_blue, self_test_image=sea, self_test_label="sea", silence_limit=10, batch_size=4)
    assert shown[0].size == (30, 20)
    row, grey = [{"class": "sea", "count": 1}], Image.new("RGB", (8, 8), "grey")
    assert reward(["x"] * 9, [grey] * 9, include=[row] * 9) == [0.0] * 9
    assert reward(["x"] * 5, [grey] * 5, include=[None] * 5) == [None] * 5  # nothing was asked for
    with pytest.raises(SilentDetectorError, match=r"found nothing in 10 images.*`silence_limit`"):
        reward(["x"], [grey], include=[row])
    reward = GenEvalReward(only_blue, self_test_image=sea, self_test_label="sea", silence_limit=10)
    assert reward(["x"] * 2, [grey, sea], include=[row] * 2) == [0.0, 1.0]
    assert reward(["x"] * 30, [grey] * 30, include=[row] * 30) == [0.0] * 30  # it has shown that it can


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mean"}, "`kind` is 'mean'"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"silence_limit": 0}, "`silence_limit` is 0"),
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"counting_threshold": 1.0}, "`counting_threshold` is 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GenEvalReward(sees(), **options)


def test_the_counting_threshold_is_the_detectors_own():
    """Three unsure dogs are three dogs, unless a threshold says otherwise; the self-test says when it does not count."""
    detector = sees(*[found("person", score=0.5)], *[found("dog", score=0.5)] * 3)
    row = [{"class": "dog", "count": 3}]
    image = [Image.new("RGB", (8, 8))]
    for options, threshold in (
        ({}, 0.3),
        ({"kind": "strict"}, 0.9),
        ({"kind": "strict", "counting_threshold": 0.4}, 0.4),
    ):
        if threshold > 0.5:
            with pytest.warns(UserWarning, match=r"does not count: of two persons .* finds 0 above .*0.9"):
                reward = GenEvalReward(detector, **options)
        else:
            reward = GenEvalReward(detector, **options)
        assert reward.counting_threshold == threshold
        assert reward(["x"], image, include=[row], tag=["counting"]) == [float(threshold < 0.5)]
    detector.counting_threshold = 0.2
    assert GenEvalReward(detector, kind="strict").counting_threshold == 0.2


@pytest.mark.parametrize(
    ("answer", "message"), [([], "1 images it returned 0 lists"), ([[{"label": "person"}]], "with {'label'")]
)
def test_a_detector_of_another_form_is_an_error(answer, message):
    with pytest.raises(TypeError, match=message):
        GenEvalReward(lambda images: answer)


def test_a_detector_must_return_what_the_threshold_asks_for():
    detector = sees()
    detector.threshold = 0.3
    GenEvalReward(detector)
    with pytest.raises(ValueError, match=r"nothing with a score below 0.3, but `threshold` is 0.2"):
        GenEvalReward(detector, threshold=0.2)


# ---------------------------------------------------------------------------------------------- training


def test_training_with_the_reward(tmp_path, monkeypatch, flux_folder, detector_folder):
    """`trl_spatial grpo` on rows as GenEval's: nested, mixed, and not all with the same keys."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
        {
            "tag": "position", "prompt": "a photo of a dog left of a person",
            "include": [{"class": "person", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        },
        {
            "tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
            "prompt": "a photo of two dogs",
        },
    ]  # fmt: skip
    Path("evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = importlib.import_module("trl_spatial.scripts.grpo")
    line = (
        f"--model_name_or_path {flux_folder} --dataset evaluation_metadata.jsonl --rewards geneval:{detector_folder} "
        f"geneval-strict:{detector_folder} --num_generations 4 --top_k 1 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 1 --lora_r 2 --num_inference_steps 3 --height 32 --width 32 --max_sequence_length 192 "
        "--max_steps 2 --logging_steps 1 --use_cpu --disable_tqdm true --report_to none --output_dir out"
    )
    trainer = script.build_trainer(*script.make_parser().parse_args_and_config(shlex.split(line)))
    trainer.train()
    trainer.save_model()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["rewards/geneval/frac_none"] == 0.0
        assert 0.0 <= log["rewards/geneval_strict/mean"] <= log["rewards/geneval/mean"] <= 1.0
    # the row that counts gets nothing from a detector that is never sure; one of the two steps has another row
    assert max(log["rewards/geneval/mean"] for log in logs) > 0.5
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
