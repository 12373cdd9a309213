"""What is in a dataset, against a count by hand and a count in another way."""

from collections import Counter

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from trl_spatial.data import QUANTITIES, SplitStatistics, format_report, validate_splits
from trl_spatial.data.charts import save_statistics
from trl_spatial.data.counts import MAX_BINS, MAX_NAMES, kinds_of, tabulate
from trl_spatial.scenes import parse_description


QUANTITY = {quantity.name: quantity for quantity in QUANTITIES}


@pytest.fixture(scope="module")
def kitchen(encode):
    """Four rows and two rows, small enough to count by hand."""

    def row(prompt, kinds, level, scene, generator, color):
        return {
            "prompt": prompt,
            "chosen": encode(PILImage.new("RGB", (32, 24), (color, 0, 0))),
            "rejected": encode(PILImage.new("L", (32, 32), color)),
            "level": level,
            "operations": [{"operation": "flip"}] * level,
            "relations": [{"relation": kind} for kind in kinds],
            "scene": scene,
            "generator": generator,
        }

    train = [
        row("A cup on a table.", ["on"], 1, "kitchen", "Qwen-Image", 1),
        row("A cup on a  table\nand a pan left  of it.", ["on", "left_of"], 2, "kitchen", "Qwen-Image", 2),
        row("A red circle is near a blue square.", ["near"], 1, "A red circle is near a blue square.", None, 3),
        row("A cup on a table.", ["on", None], 1, "garden", "Seedream", 4),
    ]
    test = [
        row("A pan.", ["on"], 3, "garden", "Seedream", 5),
        row("A lid.", ["under"], 3, "patio", "Seedream", 6),
    ]
    features = Features(
        {name: Value("string") for name in ("prompt", "scene", "generator")}
        | {name: Image() for name in ("chosen", "rejected")}
        | {"level": Value("int32"), "operations": List({"operation": Value("string")})}
        | {"relations": List({"relation": Value("string")})}
    )
    return validate_splits(
        {name: Dataset.from_list(r, features=features) for name, r in (("train", train), ("test", test))}
    )


def test_the_count_is_that_by_hand(kitchen):
    train, test = kitchen.statistics.values()
    assert (train.num_rows, train.num_checked, train.num_prompts, train.num_images, train.num_scenes) == (
        4,
        4,
        3,
        8,
        3,
    )
    assert (train.share, test.share) == (4 / 6, 2 / 6)
    assert train.counts == {
        "relations_per_prompt": {1: 2, 2: 2},
        "words_per_prompt": {5: 2, 11: 1, 8: 1},
        "levels": {1: 3, 2: 1},
        "relations": {"on": 3, "left_of": 1, "near": 1, "not given": 1},
        "operations": {"flip": 5},
        "objects_per_scene": {2: 1},
        "scenes": {"kitchen": 2, "garden": 1},
        "generators": {"Qwen-Image": 2, "Seedream": 1},
        "image_sizes": {"32x24": 4, "32x32": 4},
        "image_modes": {"RGB": 4, "L": 4},
    }
    shown = kitchen.to_dict()["splits"]["train"]
    assert shown["words_per_prompt"] == {
        "num_values": 4, "num_different": 3, "mean": 7.25, "min": 5, "max": 11, "counts": {"5": 2, "8": 1, "11": 1},
    }  # fmt: skip
    assert list(shown["relations"]["counts"]) == ["on", "left_of", "near", "not given"]


def test_splits_stand_side_by_side(kitchen):
    assert tabulate(QUANTITY["levels"], kitchen.statistics) == [("1", [3, 0]), ("2", [1, 0]), ("3", [0, 2])]
    assert tabulate(QUANTITY["relations"], kitchen.statistics) == [
        ("on", [3, 1]), ("left_of", [1, 0]), ("near", [1, 0]), ("not given", [1, 0]), ("under", [0, 1]),
    ]  # fmt: skip
    text = format_report(kitchen, "kitchen")
    assert "train     4  66.7 %        3       8       3" in text
    level = text.split("level: changed relations (share of rows)\n")[1].splitlines()
    assert level[0].split() == ["train,", "mean", "1.25", "test,", "mean", "3.00"]
    assert [line.split() for line in level[1:4]] == [
        ["1", "3", "75.0", "%", "#" * 15, "0", "0.0", "%"],
        ["2", "1", "25.0", "%", "#" * 5, "0", "0.0", "%"],
        ["3", "0", "0.0", "%", "2", "100.0", "%", "#" * 20],
    ]
    assert "kinds of changes: flip" in text


def test_the_statistics_of_rendered_pairs(good):
    for split, found in validate_splits(good).statistics.items():
        rows = good[split]
        graphs = [parse_description(prompt) for prompt in rows["prompt"]]
        assert found.counts["relations_per_prompt"] == Counter(len(graph.relations) for graph in graphs)
        assert found.counts["relations"] == Counter(r.name for graph in graphs for r in graph.relations)
        assert found.counts["objects_per_scene"] == Counter(len(graph.entities) for graph in graphs)
        assert found.counts["levels"] == Counter(rows["level"])
        assert found.counts["operations"].total() == sum(rows["level"])
        assert found.counts["generators"] == {"trl_spatial.scenes": len(rows)}
        assert found.num_images == 2 * len(rows) and not found.counts["scenes"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3], ["3"]),
        ([0, 11], [str(value) for value in range(12)]),
        ([0, 12], ["0-1", "2-3", "4-5", "6-7", "8-9", "10-11", "12-13"]),
        (
            [45, 134],
            ["40-49", "50-59", "60-69", "70-79", "80-89", "90-99", "100-109", "110-119", "120-129", "130-139"],
        ),
        ([7, 10**6], None),
    ],
)
def test_numbers_are_put_into_few_bins_that_lose_none(values, labels):
    counts = Counter(dict.fromkeys(range(values[0], values[-1] + 1, max(values[-1] // 500, 1)), 2))
    split = SplitStatistics(1, 1.0)
    split.counts["words_per_prompt"] = counts
    groups = tabulate(QUANTITY["words_per_prompt"], {"train": split, "empty": SplitStatistics(0, 0.0)})
    assert labels is None or [label for label, _ in groups] == labels
    assert len(groups) <= MAX_BINS
    assert [sum(column) for column in zip(*(inside for _, inside in groups), strict=True)] == [counts.total(), 0]
    for label, (number, _) in groups:
        low, _, high = label.partition("-")
        assert number == sum(n for value, n in counts.items() if int(low) <= value <= int(high or low))


@pytest.mark.parametrize("num_names", [1, MAX_NAMES + 1, MAX_NAMES + 2, 60])
def test_the_rarest_names_are_shown_together(num_names):
    split = SplitStatistics(1, 1.0)
    split.counts["scenes"] = Counter({f"scene {i:02}": 100 - i for i in range(num_names)})
    groups = tabulate(QUANTITY["scenes"], {"train": split})
    assert sum(number for _, (number,) in groups) == split.counts["scenes"].total()
    assert [label for label, _ in groups[:MAX_NAMES]] == [f"scene {i:02}" for i in range(num_names)][:MAX_NAMES]
    if num_names > MAX_NAMES + 1:
        assert groups[MAX_NAMES][0] == f"{num_names - MAX_NAMES} others" and len(groups) == MAX_NAMES + 1
    assert split.to_dict()["scenes"]["num_different"] == num_names
    assert len(split.to_dict()["scenes"]["counts"]) == min(num_names, 50)


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (None, None),
        ([], []),
        (["on", None], ["on", "not given"]),
        ([{"relation": "on", "arguments": []}, {"arguments": []}], ["on", "not given"]),
        ({"relation": ["on", "at"], "arguments": [[], []]}, ["on", "at"]),
        ({"relation": None}, None),
    ],
)
def test_kinds_are_read_in_every_form(value, kinds):
    assert kinds_of(value, "relation") == kinds


def pixels_of(color, image):
    return sum(number for number, pixel in image.getcolors(2**24) if pixel == color)


@pytest.mark.parametrize("num_splits", [1, 2, 8])
def test_the_picture_has_bars_of_each_split(num_splits, kitchen, good, tmp_path):
    statistics = validate_splits(good).statistics | kitchen.statistics
    some = {f"split {i}": list(statistics.values())[i % 2] for i in range(num_splits)}
    save_statistics(some, tmp_path / "statistics.png", title="a/very/long/name" * 20)
    with PILImage.open(tmp_path / "statistics.png") as image:
        assert image.format == "PNG" and image.width > 1500 and image.height > 1000
        image = image.convert("RGB")
    colors = [(0, 114, 178), (230, 159, 0)][:num_splits]
    assert all(pixels_of(color, image) > 2000 for color in colors)


def test_nothing_is_a_picture_too(tmp_path):
    save_statistics({"train": SplitStatistics(0, 0.0)}, tmp_path / "statistics.png", title="x")
    with PILImage.open(tmp_path / "statistics.png") as image:
        image.load()
