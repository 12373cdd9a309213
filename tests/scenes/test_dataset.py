"""Preference datasets of rendered scenes."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Image, Value
from PIL import Image as Picture

import trl_spatial
from tests.warm import run_python
from trl_spatial.scenes import (
    SPLITS,
    check_scene,
    describe_changes,
    make_preference_dataset,
    make_prompt_dataset,
    parse_description,
)


@pytest.fixture(scope="module")
def dataset():
    return make_preference_dataset(60, seed=1)


def test_columns_and_types(dataset):
    assert dataset.column_names == [
        "prompt", "chosen", "rejected", "perturbed_prompt", "level", "operations", "relations", "scene", "generator", "seed",
    ]  # fmt: skip
    assert set(dataset["generator"]) == {"trl_spatial.scenes"}
    assert isinstance(dataset.features["chosen"], Image) and dataset.features["prompt"] == Value("string")
    assert dataset[0]["chosen"].size == dataset[0]["rejected"].size == (64, 64)


def test_each_image_shows_its_own_text_and_not_the_other(dataset):
    for row in dataset:
        graph, perturbed = parse_description(row["prompt"]), parse_description(row["perturbed_prompt"])
        assert check_scene(row["chosen"], graph).is_correct, row["prompt"]
        assert check_scene(row["rejected"], perturbed).is_correct, row["perturbed_prompt"]
        assert not check_scene(row["chosen"], perturbed).is_correct
        assert not check_scene(row["rejected"], graph).is_correct


@pytest.mark.parametrize("length", ["short", "long"])
def test_the_scene_is_what_the_chosen_image_shows_in_short_sentences(length):
    rows = make_preference_dataset(30, seed=4, length=length, both_directions=True)
    for row in rows:
        graph = parse_description(row["scene"])
        assert graph == parse_description(row["prompt"])
        assert check_scene(row["chosen"], graph).is_correct, row["scene"]
        assert not check_scene(row["rejected"], graph).is_correct, row["scene"]
        assert row["prompt"] == row["scene"] if length == "short" else len(row["prompt"]) > len(row["scene"])
    if length == "short":  # a pair is the same pair whatever is said of it
        scenes = make_preference_dataset(30, seed=4, length="long", both_directions=True)["scene"]
        assert scenes[:] == rows["scene"][:]


def written(relation):
    return f"{relation['relation']}({', '.join(relation['arguments'])})"


def test_the_record_tells_what_was_changed(dataset):
    for row in dataset:
        before = {str(relation) for relation in parse_description(row["prompt"]).relations}
        after = {str(relation) for relation in parse_description(row["perturbed_prompt"]).relations}
        assert {written(operation["before"]) for operation in row["operations"]} == before - after
        assert {written(operation["after"]) for operation in row["operations"]} == after - before
        assert row["level"] == len(row["operations"])
        assert set(map(written, row["relations"])) == before
        # older datasets hold the changes as strings
        old = [{name: written(operation[name]) for name in ("before", "after")} for operation in row["operations"]]
        expected = "; ".join(f"{operation['before']} to {operation['after']}" for operation in old)
        assert describe_changes(row["operations"]) == describe_changes(old) == expected


def test_a_pair_depends_on_seed_split_and_index_only(dataset):
    assert make_preference_dataset(60, seed=1, num_proc=2)[:]["prompt"] == dataset[:]["prompt"]
    one = make_preference_dataset(20, seed=1)
    for column in ("chosen", "rejected"):
        for a, b in zip(one[column], dataset[:20][column], strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert make_preference_dataset(20, seed=2)[:]["prompt"] != one[:]["prompt"]


@pytest.mark.parametrize("image_size", [16, 33, 128])
def test_images_are_png_files_no_larger_than_those_of_pillow(image_size):
    rows = make_preference_dataset(12, seed=5, image_size=image_size)
    num_bytes = {"here": 0, "Pillow": 0}
    for column in ("chosen", "rejected"):
        for cell in rows.cast_column(column, Image(decode=False))[column]:
            Picture.open(io.BytesIO(cell["bytes"])).verify()  # every checksum
            image = Picture.open(io.BytesIO(cell["bytes"]))
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (image_size, image_size))
            image.save(other := io.BytesIO(), "PNG", compress_level=1)
            num_bytes["here"] += len(cell["bytes"])
            num_bytes["Pillow"] += len(other.getvalue())
    assert num_bytes["here"] < 1.05 * num_bytes["Pillow"]


def test_both_directions_exchange_the_roles():
    rows = make_preference_dataset(10, seed=3, both_directions=True)
    assert len(rows) == 20
    for first, second in zip(rows.select(range(0, 20, 2)), rows.select(range(1, 20, 2)), strict=True):
        assert (first["prompt"], first["perturbed_prompt"]) == (second["perturbed_prompt"], second["prompt"])
        np.testing.assert_array_equal(np.asarray(first["chosen"]), np.asarray(second["rejected"]))


def test_no_set_of_objects_is_in_two_splits():
    def objects(split):
        rows = make_preference_dataset(60, split=split, seed=0)
        graphs = [parse_description(prompt) for prompt in rows["prompt"]]
        return {frozenset((e.color, e.shape) for e in graph.entities) for graph in graphs}

    found = [objects(split) for split in SPLITS]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


def test_levels_relations_and_size_are_as_asked():
    rows = make_preference_dataset(
        24, levels=(2,), num_relations=(2, 3), relations=("left_of", "above"), image_size=48, length="long"
    )
    assert set(rows["level"]) == {2}
    assert rows[0]["chosen"].size == (48, 48)
    kinds = {relation["relation"] for relations in rows["relations"] for relation in relations}
    assert kinds <= {"left_of", "right_of", "above", "below"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"split": "dev"}, "split='dev'"),
        ({"levels": (5,)}, "levels=\\(5,\\)"),
        ({"num_objects": (1, 3)}, "num_objects=\\(1, 3\\)"),
        ({"num_relations": (1, 99)}, "num_relations=\\(1, 99\\)"),
        ({"relations": ("beyond",)}, "beyond"),
        ({"length": "endless"}, "length='endless'"),
        ({"image_size": 3}, "image_size=3"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_preference_dataset(**{"num_pairs": 1, **options})


def test_prompts_are_of_the_scenes_asked_for():
    options = {"num_objects": (2, 3), "num_relations": (2, 2), "relations": ("above", "below"), "length": "short"}
    prompts = make_prompt_dataset(60, seed=1, colors=("red", "blue", "pink"), shapes=("circle", "square"), **options)
    for prompt, scene in zip(prompts["prompt"], prompts["scene"], strict=True):
        graph = parse_description(scene)
        assert prompt == scene and parse_description(prompt) == graph
        assert 2 <= len(graph.entities) <= 3 and len(graph.relations) == 2
        assert {relation.name for relation in graph.relations} <= {"above", "below"}
        assert {entity.color for entity in graph.entities} <= {"red", "blue", "pink"}
        assert {entity.shape for entity in graph.entities} <= {"circle", "square"}


def test_a_prompt_depends_on_its_number_alone():
    assert make_prompt_dataset(9, seed=2)["prompt"][:4] == make_prompt_dataset(4, seed=2)["prompt"]
    assert make_prompt_dataset(4, seed=2)["prompt"] != make_prompt_dataset(4, seed=3)["prompt"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"split": "dev"}, "split='dev'"),
        ({"num_objects": (1, 3)}, "num_objects=\\(1, 3\\)"),
        ({"relations": ()}, "relations=\\(\\) is empty"),
        ({"colors": ("red", "beige")}, "colors=.*beige"),
        ({"shapes": ()}, "shapes=\\(\\)"),
        ({"colors": ("red", "blue")}, "colors=.* too few for num_objects=\\(2, 4\\)"),
        ({"length": "endless"}, "length='endless'"),
    ],
)
def test_bad_arguments_of_prompts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_prompt_dataset(**{"num_prompts": 1, **options})


def test_another_version_of_the_world_makes_its_pairs_anew(tmp_path):
    # datasets keeps generated data by the generator's arguments, whatever its code has become since
    source, copy = Path(trl_spatial.__file__).parent, tmp_path / "trl_spatial"
    copy.mkdir()
    shutil.copy(source / "__init__.py", copy)
    shutil.copytree(source / "scenes", copy / "scenes", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "cache")}
    program = "from trl_spatial.scenes import make_preference_dataset as m; print(m(3, seed=4)[0]['prompt'])"

    def first_prompt():
        ended = run_python(["-c", program], env=environment, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    before = first_prompt()
    assert first_prompt() == before
    wording = copy / "scenes" / "wording.py"
    wording.write_text(wording.read_text().replace('text + "."', 'text + " indeed."'))
    assert "indeed" in first_prompt()
